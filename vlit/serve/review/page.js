"use strict";
// The review page. The token comes in the URL's fragment and stays in this tab (sessionStorage), so a reload keeps it.
const $ = (id) => document.getElementById(id);
const COLOURS = ["#2563c9", "#c2570c", "#12805c", "#8b3fc0", "#b3273d", "#0e7490", "#b8860b", "#4d7c0f"];
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
const token = sessionStorage.getItem("token") || "";
const state = { rows: null, shown: [], at: 0, decisions: new Map(), record: null, editing: false, busy: false, turn: 0 };
let urls = [];

function say(text) {
  $("message").textContent = text;
  clearTimeout(say.timer);
  if (text) say.timer = setTimeout(() => { $("message").textContent = ""; }, 6000);
}

async function ask(path, { body, query = {}, blob = false } = {}) {
  const reviewer = $("reviewer").value.trim() || "reviewer 1";
  const url = path + (body ? "" : "?" + new URLSearchParams({ reviewer, ...query }));
  const headers = { "X-Review-Token": token };
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(url, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify({ reviewer, ...body }) });
  } catch {
    throw new Error("The server does not answer. Start it again and open the new address.");
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || "HTTP " + answer.status);
  return blob ? answer.blob() : answer.json();
}

function element(name, text, cls) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  return made;
}

function options(select, names) {
  const kept = select.value;
  select.replaceChildren(...names.map(([value, text]) => {
    const option = element("option", text);
    option.value = value;
    return option;
  }));
  if (names.some(([value]) => value === kept)) select.value = kept;
}

async function load() {
  state.rows = await ask("/api/rows");
  state.decisions = new Map(state.rows.decisions);
  $("name").textContent = state.rows.name;
  document.title = state.rows.name + " · vlit review";
  for (const name of ["domain", "type"])
    options($(name), [["", "all"], ...state.rows[name].names.map((value, at) => [String(at), value || "(none)"])]);
  options($("score"), [["", "any"], ...Object.keys(state.rows.scores).map((name) => [name, name])]);
  for (const id of ["from", "to"]) $(id).disabled = !$("score").value;
  filter();
}

function filter(row) {
  const wanted = { domain: $("domain").value, type: $("type").value, status: $("status").value, score: $("score").value };
  const low = parseFloat($("from").value), high = parseFloat($("to").value);
  state.shown = [];
  for (let n = 0; n < state.rows.records; n++) {
    if (wanted.domain !== "" && state.rows.domain.of[n] !== +wanted.domain) continue;
    if (wanted.type !== "" && state.rows.type.of[n] !== +wanted.type) continue;
    const decision = state.decisions.get(n);
    if (wanted.status !== "all" && (decision || "open") !== wanted.status) continue;
    if (wanted.score) {
      const value = state.rows.scores[wanted.score][n];
      if (value === null || value < low || value > high) continue;
    }
    state.shown.push(n);
  }
  let at = row === undefined ? state.shown.findIndex((n) => !state.decisions.has(n)) : state.shown.findIndex((n) => n >= row);
  if (at < 0) at = row === undefined ? 0 : Math.max(0, state.shown.length - 1);
  return show(at);
}

async function show(at) {
  endEdit();
  const none = !state.shown.length;
  $("main").hidden = none;
  $("empty").hidden = !none;
  refresh();
  if (none) { state.record = null; return; }
  state.at = Math.min(Math.max(at, 0), state.shown.length - 1);
  const turn = ++state.turn;
  try {
    const record = await ask("/api/record", { query: { row: state.shown[state.at] } });
    if (turn !== state.turn) return; // another record was asked for meanwhile
    state.record = record;
    draw();
    await pictures(record, turn);
  } catch (error) { say(error.message); }
}

function draw() {
  const r = state.record;
  $("id").textContent = r.id;
  const scores = Object.entries(r.scores).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${value.toFixed(2)}`);
  $("about").textContent = [r.domain, r.type, ...scores].filter(Boolean).join(" · ");
  $("decision").textContent = { accept: "accepted", edit: "edited", reject: "rejected" }[r.decision] || "";
  $("decision").className = "badge " + (r.decision || "");
  $("place").textContent = `${state.at + 1} of ${state.shown.length}`;
  $("turns").replaceChildren(...r.turns.map((turn) => {
    const box = element("div", undefined, `turn ${turn.role}${turn.text !== turn.was ? " changed" : ""}`);
    box.append(element("b", turn.role), words(turn.text, r.placeholder));
    return box;
  }));
  if (r.changed) say("This record changed after it was decided on. Decide again.");
}

function words(text, placeholder) {
  const line = element("p");
  text.split(placeholder).forEach((part, at) => {
    if (at) line.append(element("i", "picture"), " ");
    line.append(at ? part.replace(/^\n/, "") : part);
  });
  return line;
}

async function pictures(record, turn) {
  const made = [], fresh = [];
  for (let place = 0; place < record.pictures; place++) {
    const frame = element("div", undefined, "picture");
    try {
      const url = URL.createObjectURL(await ask("/api/picture", { query: { row: record.row, place }, blob: true }));
      fresh.push(url);
      const image = new Image();
      image.alt = "picture " + (place + 1);
      image.src = url;
      await image.decode();
      if (Math.max(image.naturalWidth, image.naturalHeight) <= 160) image.className = "small";
      frame.append(image, ...regions(record.regions.filter((region) => region.image === place)));
    } catch { frame.append(element("div", "The picture cannot be shown.", "missing")); }
    made.push(frame);
  }
  if (turn !== state.turn) { fresh.forEach((url) => URL.revokeObjectURL(url)); return; }
  $("pictures").replaceChildren(...made);
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = fresh;
  document.body.dataset.row = record.row;
}

function regions(boxes) {
  if (!boxes.length) return [];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  const labels = element("div", undefined, "labels");
  boxes.forEach(({ label, box: [x0, y0, x1, y1] }, at) => {
    const colour = COLOURS[at % COLOURS.length];
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0 })) rect.setAttribute(name, value);
    rect.style.stroke = colour;
    svg.append(rect);
    const text = element("span", label, y0 < 0.06 ? "inside" : "");
    text.style.left = 100 * x0 + "%";
    text.style.top = 100 * y0 + "%";
    text.style.background = colour;
    labels.append(text);
  });
  return [svg, labels];
}

async function refresh() {
  try {
    const all = state.rows.records, { mine, agreement } = await ask("/api/summary");
    const done = mine.accept + mine.edit + mine.reject;
    for (const action of ["accept", "edit", "reject"]) $("bar-" + action).style.width = (100 * mine[action]) / all + "%";
    $("progress").textContent = `${done} of ${all} decided: ${mine.accept} accepted, ${mine.edit} edited, ${mine.reject} rejected`;
    $("agreement").textContent = agreement
      .map((row) => `${row.a} / ${row.b}: κ ${row.kappa.toFixed(2)}, ${Math.round(100 * row.alike)} % alike of ${row.records}`).join(" · ");
  } catch (error) { say(error.message); }
}

async function decide(action, turns) {
  if (state.busy || !state.record) return;
  state.busy = true;
  try {
    const row = state.record.row;
    await ask("/api/decide", { body: { row, action, turns } });
    state.decisions.set(row, action);
    endEdit();
    const next = state.shown.indexOf(row) + 1;
    if ($("status").value !== "all") await filter(row);
    else if (next < state.shown.length) await show(next);
    else { await show(state.shown.length - 1); say("This was the last record."); }
  } catch (error) { say(error.message); } finally { state.busy = false; }
}

async function undo() {
  if (state.busy) return;
  state.busy = true;
  try {
    const { row } = await ask("/api/undo", { body: {} });
    if (row === null) { say("Nothing to undo."); return; }
    const { decisions } = await ask("/api/rows");
    state.decisions = new Map(decisions);
    if (!state.shown.includes(row)) for (const id of ["domain", "type", "score"]) $(id).value = "";
    if ($("status").value !== "all" && $("status").value !== "open") $("status").value = "all";
    await filter(row);
  } catch (error) { say(error.message); } finally { state.busy = false; }
}

function edit() {
  if (state.editing || !state.record) return;
  state.editing = true;
  $("turns").querySelectorAll(".turn").forEach((box, at) => {
    const area = element("textarea");
    area.value = state.record.turns[at].text;
    area.rows = Math.max(1, Math.ceil(area.value.length / 70), area.value.split("\n").length);
    box.querySelector("p").replaceWith(area);
  });
  for (const id of ["accept", "edit", "reject", "undo", "previous", "next", "place"]) $(id).hidden = true;
  for (const id of ["save", "cancel"]) $(id).hidden = false;
  ($("turns").querySelector(".assistant textarea") || $("turns").querySelector("textarea")).focus();
}

function endEdit() {
  state.editing = false;
  for (const id of ["accept", "edit", "reject", "undo", "previous", "next", "place"]) $(id).hidden = false;
  for (const id of ["save", "cancel"]) $(id).hidden = true;
}

const save = () => decide("edit", [...$("turns").querySelectorAll("textarea")].map((area) => area.value));
const cancel = () => { endEdit(); draw(); };
const move = (step) => show(state.at + step);

async function exportAccepted() {
  try {
    const { records, file } = await ask("/api/export", { body: {} });
    say(`${records} accepted records written to ${file}.`);
  } catch (error) { say(error.message); }
}

document.addEventListener("keydown", (event) => {
  if (state.editing) {
    if (event.key === "Escape") { event.preventDefault(); cancel(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const act = {
    a: () => decide("accept"), e: edit, r: () => decide("reject"), u: undo, ArrowRight: () => move(1), ArrowLeft: () => move(-1),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
for (const [id, act] of Object.entries({
  accept: () => decide("accept"), edit, reject: () => decide("reject"), undo, save, cancel, export: exportAccepted,
  previous: () => move(-1), next: () => move(1),
})) $(id).addEventListener("click", (event) => { event.currentTarget.blur(); act(); });
for (const id of ["domain", "type", "score", "from", "to", "status"])
  $(id).addEventListener("change", () => {
    for (const bound of ["from", "to"]) $(bound).disabled = !$("score").value;
    $(id).blur();
    filter();
  });
$("reviewer").value = localStorage.getItem("reviewer") || "reviewer 1";
$("reviewer").addEventListener("change", () => {
  localStorage.setItem("reviewer", $("reviewer").value.trim());
  $("reviewer").blur();
  load().catch((error) => say(error.message));
});
load().catch((error) => say(error.message));
