// The queued calls, live and newest first: what waits, what failed for good,
// and the two things that can be done about a call. Hidden where the gateway
// has no queue.

import * as address from "./address.js";
import { asList, element, setLines, setText, ui } from "./dom.js";
import { isAble, setAble } from "./list.js";
import { ask, askJson } from "./poll.js";

const PAGE = 50;

let names = () => [];
let refresh = () => {};
let shownIds = []; // of the page shown
let last = "";

const cell = (label, text, className = "") => {
  const td = element("td", { className }, text);
  td.setAttribute("role", "cell");
  td.dataset.label = label;
  return td;
};

// What can be done about a call: the word on the button, the method, the path.
function actionOf(call) {
  const path = `system/calls/${encodeURIComponent(call.callId)}`;
  if (call.dead) return ["Retry", "POST", `${path}/retry`];
  if (["queued", "retrying"].includes(call.state)) return ["Cancel", "DELETE", path];
  return null;
}

async function act(button, method, path) {
  button.disabled = true;
  const response = await ask(path, { method }).catch(() => null);
  const done = response?.ok ?? false;
  setLines(ui.queueTrouble, done ? [] : [response ? (await response.text()).trim() : "The gateway cannot be reached."]);
  refresh();
}

function stateCell(call) {
  const td = cell("State", "");
  const word = call.dead ? "dead" : call.state;
  const badge = element("span", { className: "state" }, word);
  badge.dataset.state = word;
  td.append(badge);
  if (call.reason) td.append(element("span", { className: "reason" }, call.reason));
  return td;
}

function rowOf(call) {
  const tr = document.createElement("tr");
  tr.dataset.call = call.callId;
  tr.setAttribute("role", "row");
  const name = element("th", { scope: "row", title: `X-Call-Id ${call.callId}` }, call.function);
  name.setAttribute("role", "rowheader");
  const action = cell("", "", "action");
  const [text, method, path] = actionOf(call) ?? [];
  if (text) {
    const button = element("button", { type: "button", ariaLabel: `${text} call ${call.callId}` }, text);
    button.addEventListener("click", () => act(button, method, path));
    action.append(button);
  }
  const status = call.status ? String(call.status) : "";
  const submitted = new Date(call.submittedAt).toLocaleString();
  const numbers = [cell("Attempts", String(call.attempts), "number"), cell("Status", status, "number")];
  tr.append(name, stateCell(call), ...numbers, cell("Submitted", submitted, "time"), action);
  return tr;
}

// Asks for the queue once. A gateway without one says 501, and nothing is shown.
export async function poll() {
  let lines;
  try {
    lines = asList(await askJson("system/queues"));
  } catch (error) {
    if (error.status !== 501) throw error;
    ui.queue.hidden = true;
    return;
  }
  const sum = (member) => lines.reduce((all, line) => all + line[member], 0);
  const counts = ["pending", "running", "delayed", "dead"].map((member) => `${sum(member)} ${member}`);
  setText(ui.queueCounts, counts.join(" · "));
  fillNames(lines);
  ui.queue.hidden = false;
  const wanted = address.read();
  const query = new URLSearchParams({ order: "newest", limit: PAGE + 1 });
  for (const name of ["state", "function", "after"]) if (wanted[name]) query.set(name, wanted[name]);
  let calls = [];
  try {
    calls = asList(await askJson(`system/calls?${query}`));
    setLines(ui.queueInvalid, []);
  } catch (error) {
    if (error.status !== 400) throw error;
    setLines(ui.queueInvalid, [error.message]);
  }
  // The filter may have been changed meanwhile; then it is asked again at once.
  if (JSON.stringify(wanted) === JSON.stringify(address.read())) show(calls, wanted);
}

function fillNames(lines) {
  const all = [...new Set([...names(), ...lines.map((line) => line.function)])].sort().slice(0, 1000);
  if (all.join() === [...ui.queueNames.children].map(({ value }) => value).join()) return;
  ui.queueNames.replaceChildren(...all.map((value) => element("option", { value })));
}

const key = (call) => [call.callId, call.state, call.attempts, call.status, call.dead, call.reason].join();

function show(found, { state, function: name, after }) {
  const calls = found.slice(0, PAGE);
  ui.queueTable.hidden = calls.length === 0;
  ui.queueNone.hidden = calls.length > 0 || !ui.queueInvalid.hidden;
  const filtered = state || name ? "No queued call matches the filter." : "No queued calls.";
  setText(ui.queueNone, after ? "No calls are older." : filtered);
  setAble(ui.queueNewest, after !== "");
  setAble(ui.queueNewer, after !== "");
  setAble(ui.queueOlder, found.length > PAGE);
  ui.queuePager.hidden = after === "" && found.length <= PAGE;
  setText(ui.queuePageText, after ? "Older calls" : "The newest calls");
  shownIds = calls.map((call) => call.callId);
  // Buttons that are drawn again lose the focus, so they are only when something changed.
  const now = calls.map(key).join(";");
  if (now === last) return;
  last = now;
  const focused = document.activeElement?.closest("tr")?.dataset.call;
  ui.queueRows.replaceChildren(...calls.map(rowOf));
  if (focused) ui.queueRows.querySelector(`[data-call="${CSS.escape(focused)}"] button`)?.focus();
}

// Shows the page that begins after the call `after`; `newer`: the pages before it.
function turn(after, newer) {
  address.write({ after }, { push: true, newer });
  refresh();
}

function readFilter() {
  const { state, function: name } = address.read();
  ui.queueState.value = state;
  ui.queueFunction.value = name;
}

export function start({ wake, names: known }) {
  [names, refresh] = [known, wake];
  readFilter();
  const filter = () => {
    const changes = { state: ui.queueState.value, function: ui.queueFunction.value.trim(), after: "" };
    address.write(changes, { push: true, newer: [] });
    wake();
  };
  ui.queueState.addEventListener("change", filter);
  ui.queueFunction.addEventListener("change", filter);
  const onClick = (button, act) => button.addEventListener("click", () => { if (isAble(button)) act(); });
  onClick(ui.queueNewest, () => turn("", []));
  onClick(ui.queueNewer, () => turn(address.trail().at(-1) ?? "", address.trail().slice(0, -1)));
  onClick(ui.queueOlder, () => {
    const { after } = address.read();
    if (shownIds.length) turn(shownIds.at(-1), [...address.trail(), after]);
  });
  addEventListener("popstate", () => { readFilter(); wake(); });
}
