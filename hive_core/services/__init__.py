"""Floor 3: one noun a file, with its rows and its rules; a change and its event are one transaction."""
