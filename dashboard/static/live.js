// Swaps the rows that the live stream brings, and sends forms. Everything is rendered on the server.
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const page = document.body.dataset;

// ---- rows ----------------------------------------------------------------------------------------------------------
const INSIDE = "a, button, summary, input, textarea, select, [tabindex]";

function localTime(root) {
  for (const time of all("time", root)) {
    const at = new Date(time.dateTime), today = new Date().toDateString() === at.toDateString();
    time.textContent = today ? at.toLocaleTimeString("sv") : at.toLocaleString("sv").slice(5, 16);
  }
}

// What the reader did to a row survives its replacement: open details, typed text, what was ticked or picked, focus.
function keep(old, fresh) {
  const opened = all("details", old);
  all("details", fresh).forEach((details, i) => { if (opened[i]) details.open = opened[i].open; });
  const typed = all("textarea, input:not([type=hidden])", old);
  all("textarea, input:not([type=hidden])", fresh).forEach((field, i) => {
    if (!typed[i]) return;
    // A card that shows something else now was not chosen.
    if (field.type === "checkbox") field.checked = typed[i].checked && typed[i].value === field.value;
    else field.value = typed[i].value;
  });
  const picked = all("select", old);
  all("select", fresh).forEach((field, i) => {
    if (picked[i] && !picked[i].selectedOptions[0]?.defaultSelected) field.value = picked[i].value;
  });
  const focused = all(INSIDE, old).indexOf(document.activeElement);
  return () => { if (focused >= 0) all(INSIDE, fresh)[focused]?.focus({ preventScroll: true }); };
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  localTime(template.content);
  return template.content.firstElementChild;
}

// A click that was on its way when something moved would meet a button whose card nobody has read: the second of a
// double click, above all. So one that approves is not taken where it was not for long, whatever pushed it there.
const READ_MS = 1000, SLIGHT_PX = 4;
const movedAt = new Map();  // of each button that approves, by what it approves
let placed = null;  // where they were before what this frame changes
const digest = (card) => $("input[name=digest]", card)?.value;
const deed = (button) => `${button.form.action} ${$("input[type=hidden]", button.form)?.name}`;

function places() {
  return new Map(all(".approve").map((button) => {
    const { x, y } = button.getBoundingClientRect();
    return [deed(button), { x, y, onPage: y + scrollY, shown: digest(button.form) }];
  }));
}

function beforeChange() {
  if (placed) return;
  placed = places();
  requestAnimationFrame(noteMoves);
}

function noteMoves() {
  if (!placed) return;
  for (const [key, now] of places()) {
    const was = placed.get(key);
    // Not where the reader scrolled, nor where the browser did so that it stays where it was.
    const stays = (side) => was && Math.abs(was[side] - now[side]) < SLIGHT_PX;
    const same = was?.shown === now.shown && stays("x") && (stays("y") || stays("onPage"));
    if (!same) movedAt.set(key, performance.now());
  }
  placed = null;
}

function isRead(button) {
  noteMoves();  // of a change that was not painted yet
  return performance.now() - (movedAt.get(deed(button)) ?? -READ_MS) >= READ_MS;
}

// A card is long to listen to, with all it shows: what came is told by its heading.
function hear(fresh, old) {
  const heard = fresh.closest("[data-heard]") && $("#heard");
  if (!heard || (old && digest(old) === digest(fresh))) return;
  const said = document.createElement("p");
  said.textContent = `${old ? "shows something else now" : "your call"}: ${$("h3", fresh).textContent}`;
  heard.append(said);
  if (heard.children.length > 3) heard.firstElementChild.remove();
}

function swap({ target, html, list, place, once }) {
  const old = document.getElementById(target), into = list && document.getElementById(list);
  if (old && once) return;
  beforeChange();
  if (!html) {
    if (old?.contains(document.activeElement)) $("#y3r-c4ll-title")?.focus();
    return old?.remove();
  }
  const fresh = parse(html);
  if (old) {
    const refocus = keep(old, fresh);
    old.replaceWith(fresh);
    refocus();
    hear(fresh, old);
  } else if (into) {
    fresh.classList.add("fresh");
    into[place](fresh);
    hear(fresh);
    const limit = Number(into.dataset.keep || 1e9);
    while (into.children.length > limit) (place === "append" ? into.firstElementChild : into.lastElementChild).remove();
  }
}

// How many cards are chosen, beside the button that approves them together.
function countChosen() {
  const button = $("#approve-chosen"), chosen = all("input[form=together]:checked").length;
  if (!button) return;
  $("#chosen").textContent = `(${chosen})`;
  button.disabled = chosen === 0;
}

function count() {
  countChosen();
  for (const badge of all("[data-counts]")) {
    const lists = badge.dataset.counts.split(" ").map((id) => document.getElementById(id));
    badge.textContent = lists.reduce((sum, list) => sum + list.children.length, 0);
    if ("title" in badge.dataset) {
      document.title = document.title.replace(/^(\(\d+\) )?/, badge.textContent === "0" ? "" : `(${badge.textContent}) `);
    }
  }
}

// ---- the stream ----------------------------------------------------------------------------------------------------
let stream = null, after = page.after;

function show(state, word) {
  beforeChange();
  $("#link").dataset.link = state;
  $("#link-word").textContent = word;
}

function openStream() {
  if (stream || document.hidden || !page.live) return;
  stream = new EventSource(`${page.live}?after=${encodeURIComponent(after)}`);
  stream.onopen = () => show("on", "live");
  stream.onmessage = (event) => {
    after = event.lastEventId || after;
    swap(JSON.parse(event.data));
    count();
  };
  stream.addEventListener("reset", () => { closeStream(); location.reload(); });
  stream.onerror = () => {
    show("off", "reconnecting");
    // The server said no: signed out elsewhere, most likely. The page knows what to say.
    if (stream.readyState === EventSource.CLOSED) { closeStream(); setTimeout(() => location.reload(), 3000); }
  };
}

function closeStream() {
  stream?.close();
  stream = null;
}

// Browsers allow six connections to a port: a tab that nobody sees gives its own back, and catches up when shown.
document.addEventListener("visibilitychange", () => (document.hidden ? closeStream() : openStream()));
addEventListener("pagehide", closeStream);
addEventListener("pageshow", openStream);

// ---- forms ---------------------------------------------------------------------------------------------------------
function toast(text, kind) {
  const said = document.createElement("p");
  said.className = `toast ${kind}`;
  said.textContent = text;
  $("#toasts").append(said);
  setTimeout(() => said.remove(), kind === "bad" ? 12000 : 5000);
}

async function send(form, button) {
  const written = form.elements.body?.value, sent = chosen, fields = new FormData(form);
  const withFiles = fields.getAll("files").some((file) => file.name);
  if (!withFiles) fields.delete("files");
  try {
    const answer = await fetch(form.action, {
      method: "POST", body: withFiles ? fields : new URLSearchParams(fields), headers: { Accept: "application/json" },
    });
    const said = await answer.json();
    if (answer.status === 401) return location.reload();
    if (said.error) return said.error.message.split("\n").forEach((line) => toast(line, "bad"));
    for (const line of said.said.split("\n")) toast(line, "good");
    if (!page.live) return location.reload();
    // What was written while this was on its way is not ours to throw away.
    if ("reset" in form.dataset && form.elements.body.value === written && chosen === sent) { const to = form.elements.to.value; form.reset(); form.elements.to.value = to; reply("", ""); choose([]); }
  } catch {
    toast(`cannot reach the hive: is its daemon running${withFiles ? ", and each file still there" : ""}?`, "bad");
  }
}

document.addEventListener("submit", async (event) => {
  const form = event.target, button = event.submitter ?? $("button:not([type=button])", form);
  if (!("fetch" in form.dataset)) return;
  event.preventDefault();
  if (button.getAttribute("aria-busy") === "true") return;
  if (button.matches(".approve") && !isRead(button)) {
    return toast("what you clicked on has just moved or changed: look again, then click", "bad");
  }
  const ask = form.elements.ask?.value;
  if (ask && !confirm(ask)) return;
  button.setAttribute("aria-busy", "true");
  await send(form, button);
  button.removeAttribute("aria-busy");
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || !("enterSends" in event.target.dataset)) return;
  event.preventDefault();
  if (event.target.value.trim() || chosen.length) event.target.form.requestSubmit();
});

function reply(id, to) {
  const form = $("#composer"), badge = $("#no-reply");
  form.elements.in_reply_to.value = id;
  badge.hidden = !id;
  $("b", badge).textContent = id;
  if (id && to && $(`#to-${to}`)) form.elements.to.value = to;
  if (id) form.elements.body.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-reply]");
  if (button) reply(button.dataset.reply, button.dataset.to);
  if (event.target.closest?.("#no-reply")) reply("", "");
});

// ---- files that go with a message ----------------------------------------------------------------------------------
const composer = $("#composer"), picker = $("#files");
let chosen = [];  // another list with each change

function choose(files) {
  if (!composer) return;
  const held = new DataTransfer(), list = $("#chosen-files");
  for (const file of files) held.items.add(file);
  picker.files = held.files;
  chosen = files;
  list.replaceChildren(...files.map((file, i) => {
    const row = document.createElement("li"), drop = document.createElement("button");
    row.textContent = `${file.name} · ${file.size.toLocaleString("en")} bytes `;
    drop.type = "button";
    drop.className = "quiet";
    drop.textContent = "✕";
    drop.dataset.drops = i;
    drop.setAttribute("aria-label", `do not send ${file.name}`);
    row.append(drop);
    return row;
  }));
  list.hidden = !files.length;
  composer.elements.body.required = !files.length;
}

// What the hive would refuse is refused before it is on its way.
function add(files) {
  const all = [...chosen, ...files], { most, each, together } = composer.dataset;
  const bytes = (limit) => `${Number(limit).toLocaleString("en")} bytes`;
  const large = all.find((file) => file.size > Number(each));
  if (all.length > Number(most)) toast(`cannot attach ${all.length} files: the limit is ${most} a message`, "bad");
  else if (large) toast(`cannot attach ${large.name}: it has ${bytes(large.size)} and the limit is ${bytes(each)}`, "bad");
  else if (all.reduce((sum, file) => sum + file.size, 0) > Number(together)) toast(`cannot attach so much: the limit is ${bytes(together)} a message`, "bad");
  else return choose(all);
  choose(chosen);
}

if (composer) {
  choose([...picker.files]);  // which the browser kept over a reload
  picker.addEventListener("change", () => add(picker.files));
  const brings = (event) => event.dataTransfer?.types.includes("Files");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (!brings(event)) return;
      event.preventDefault();  // or the browser would open the file in the place of this page
      composer.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
      if (kind !== "drop") return;
      if ([...event.dataTransfer.items].some((item) => item.webkitGetAsEntry?.()?.isDirectory)) {
        return toast("cannot attach a folder: drop its files, or an archive of it", "bad");
      }
      add(event.dataTransfer.files);
    });
  }
  composer.elements.body.addEventListener("paste", (event) => {
    // What was copied from a document is text and a picture of it at once: then it is the text.
    if (!event.clipboardData.files.length || event.clipboardData.getData("text/plain")) return;
    event.preventDefault();
    add(event.clipboardData.files);
  });
  $("#chosen-files").addEventListener("click", (event) => {
    const at = event.target.dataset.drops;
    if (at !== undefined) choose(chosen.filter((_, i) => i !== Number(at)));
  });
}

document.addEventListener("change", countChosen);

localTime(document);
countChosen();
openStream();
