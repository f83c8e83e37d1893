"""Floor 3: one noun a file, with its rows and its rules; a change and the event that tells of it are one transaction."""
