// Live list of queued calls, newest first, with buttons to cancel a pending call
// and to retry a dead letter. Hidden when the gateway has no queue.

import * as address from "./address.js";
import { asList, element, setLines, setText, ui } from "./dom.js";
import { isAble, setAble } from "./list.js";
import { ask, askJson } from "./poll.js";

const PAGE = 50;

let names = () => [];
let refresh = () => {};
let shownIds = []; // calls of the current page
let last = "";

const cell = (label, text, className = "") => {
  const td = element("td", { className }, text);
  td.setAttribute("role", "cell");
  td.dataset.label = label;
  return td;
};

// The action on a call: label of the button, method, path.
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
  const state = call.dead ? "dead" : call.state;
  const badge = element("span", { className: "state" }, state);
  badge.dataset.state = state;
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

// Updates the list once. A gateway without a queue returns 501, and the list is hidden.
export async function poll() {
  let depths;
  try {
    depths = asList(await askJson("system/queues"));
  } catch (error) {
    if (error.status !== 501) throw error;
    ui.queue.hidden = true;
    return;
  }
  const total = (member) => depths.reduce((sum, depth) => sum + depth[member], 0);
  const counts = ["pending", "running", "delayed", "dead"].map((member) => `${total(member)} ${member}`);
  setText(ui.queueCounts, counts.join(" · "));
  fillNames(depths);
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
  // Drop the response if the filter has changed meanwhile: the next poll follows immediately.
  if (JSON.stringify(wanted) === JSON.stringify(address.read())) show(calls, wanted);
}

function fillNames(depths) {
  const all = [...new Set([...names(), ...depths.map((depth) => depth.function)])].sort().slice(0, 1000);
  if (all.join() === [...ui.queueNames.children].map(({ value }) => value).join()) return;
  ui.queueNames.replaceChildren(...all.map((value) => element("option", { value })));
}

const key = (call) => [call.callId, call.state, call.attempts, call.status, call.dead, call.reason].join();

function show(found, { state, function: name, after }) {
  const calls = found.slice(0, PAGE);
  ui.queueTable.hidden = calls.length === 0;
  ui.queueNone.hidden = calls.length > 0 || !ui.queueInvalid.hidden;
  const filtered = state || name ? "No queued call matches the filter." : "No queued calls.";
  setText(ui.queueNone, after ? "No older calls." : filtered);
  setAble(ui.queueNewest, after !== "");
  setAble(ui.queueNewer, after !== "");
  setAble(ui.queueOlder, found.length > PAGE);
  ui.queuePager.hidden = after === "" && found.length <= PAGE;
  setText(ui.queuePageText, after ? "Older calls" : "The newest calls");
  shownIds = calls.map((call) => call.callId);
  // Redrawn buttons lose the focus, so rows are redrawn only after a change.
  const now = calls.map(key).join(";");
  if (now === last) return;
  last = now;
  const focused = document.activeElement?.closest("tr")?.dataset.call;
  ui.queueRows.replaceChildren(...calls.map(rowOf));
  if (focused) ui.queueRows.querySelector(`[data-call="${CSS.escape(focused)}"] button`)?.focus();
}

// Shows the page that begins after the call `after`. `newer`: cursors of the pages before it.
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
