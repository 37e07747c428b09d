// The list of functions: sorted, filtered, paged. Text from the API is never
// parsed as HTML.

import * as address from "./address.js";
import { asList, setLines, setText, ui } from "./dom.js";

const PAGE = 50;

// The name in the function's URL, which is unique.
const keyOf = (item) => (item.namespace ? `${item.name}.${item.namespace}` : String(item.name));

let items = new Map(); // key -> item of the API, sorted by key
const rows = new Map(); // key -> { tr }, rows of the current page
let selected = address.readSelected();
let loaded = false;
let onSelect = () => {};

export const selectedKey = () => selected;
export const itemOf = (key) => items.get(key);
export const names = () => [...items.keys()];

export function showFunctions(list) {
  const pairs = list.filter((item) => item?.name).map((item) => [keyOf(item), item]);
  items = new Map(pairs.sort(([a], [b]) => (a < b ? -1 : 1)));
  loaded = true;
  show();
}

// The list cannot be loaded. The last one stays; the caller marks it as outdated.
export function showListTrouble(text) {
  if (!loaded) setText(ui.loading, `The list of functions cannot be loaded: ${text}`);
}

function matches(item, words) {
  const text = `${item.name} ${item.image ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

// Draws the page of the list that the address selects.
function show() {
  const { filter, page } = address.read();
  const words = filter.toLowerCase().split(/\s+/);
  const found = [...items].filter(([, item]) => matches(item, words));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const at = Math.min(Math.max(1, Number.parseInt(page, 10) || 1), pages);
  const shown = found.slice((at - 1) * PAGE, at * PAGE);
  fillRows(shown);
  setText(ui.count, found.length === items.size ? `${items.size}` : `${found.length} of ${items.size}`);
  ui.loading.hidden = loaded;
  ui.table.hidden = shown.length === 0;
  ui.empty.hidden = !loaded || items.size > 0;
  ui.nomatch.hidden = items.size === 0 || found.length > 0;
  ui.pager.hidden = pages === 1;
  setText(ui.pageText, `Page ${at} of ${pages}`);
  setAble(ui.pageBack, at > 1);
  setAble(ui.pageNext, at < pages);
  ui.pager.dataset.page = at;
  showSelection();
}

// Not `disabled`: the button would lose the focus.
export function setAble(button, able) {
  if (able) button.removeAttribute("aria-disabled");
  else button.setAttribute("aria-disabled", "true");
}

export const isAble = (button) => button.getAttribute("aria-disabled") !== "true";

function fillRows(shown) {
  const byKey = new Map(shown);
  for (const [key, row] of rows) if (!byKey.has(key)) removeRow(key, row.tr);
  // The list is sorted, so remaining rows never move and keep the focus.
  let next = ui.rows.firstElementChild;
  for (const [key, item] of shown) {
    const row = rows.get(key) ?? newRow(key);
    if (row.tr === next) next = next.nextElementSibling;
    else ui.rows.insertBefore(row.tr, next);
    fillRow(row.tr, item);
  }
}

function newRow(key) {
  const tr = ui.row.content.firstElementChild.cloneNode(true);
  tr.addEventListener("click", () => select(key));
  rows.set(key, { tr });
  return rows.get(key);
}

function removeRow(key, tr) {
  if (tr.contains(document.activeElement)) (neighbour(tr, 1) ?? ui.filter).focus();
  tr.remove();
  rows.delete(key);
}

// Why a function does not start: how its last start ended, and the last line of its output.
function failureOf({ startFailure }) {
  if (!startFailure) return [];
  const { starts, reason, lastOutput } = startFailure;
  return [`${starts} starts in a row have failed: ${reason}`, lastOutput].filter(Boolean);
}

const stateOf = (replicas, available, failure) => {
  if (failure.length && !available) return "crashing";
  if (!replicas && !available) return "zero";
  return !replicas || available < replicas ? "scaling" : "ready";
};

function fillRow(tr, item) {
  const cell = (selector) => tr.querySelector(selector);
  const [replicas, available] = [item.replicas ?? 0, item.availableReplicas ?? 0];
  const image = item.image ?? "";
  const failure = failureOf(item);
  const state = stateOf(replicas, available, failure);
  setText(cell(".pick"), item.name);
  setText(cell(".image"), image);
  cell(".image").title = image;
  setText(cell(".replicas"), `${available}/${replicas}`);
  setText(cell(".calls"), (item.invocationCount ?? 0).toLocaleString());
  setText(cell(".state"), state);
  cell(".state").dataset.state = state;
  setLines(cell(".reason"), failure);
}

const neighbour = (tr, step) =>
  (step > 0 ? tr.nextElementSibling : tr.previousElementSibling)?.querySelector(".pick");

function select(key) {
  selected = key;
  address.writeSelected(key);
  showSelection();
  // On a narrow screen the form is below the list, outside the viewport.
  if (ui.callSection.getBoundingClientRect().top > innerHeight - 120) ui.callSection.scrollIntoView();
}

export function showSelection() {
  for (const [key, { tr }] of rows) {
    tr.classList.toggle("selected", key === selected);
    tr.querySelector(".pick").setAttribute("aria-pressed", String(key === selected));
  }
  onSelect(selected);
}

function turn(step) {
  address.write({ page: String(Number(ui.pager.dataset.page) + step) }, { push: true });
  show();
  ui.lister.scrollIntoView({ block: "nearest" });
}

function showNamespaces(list) {
  const all = asList(list).map(String).sort();
  const before = ui.namespace.value;
  const old = [...ui.namespace.options].map((option) => option.value);
  ui.namespaceField.hidden = all.length < 2;
  if (all.join() === old.join()) return;
  ui.namespace.replaceChildren(...all.map((name) => new Option(name)));
  const wanted = [before, selected.split(".")[1], "openfaas-fn"].find((name) => all.includes(name));
  if (wanted) ui.namespace.value = wanted;
}
export { showNamespaces };

export function start({ whenSelected, wake }) {
  onSelect = whenSelected;
  ui.filter.value = address.read().filter;
  ui.filter.addEventListener("input", () => {
    address.write({ filter: ui.filter.value, page: "" });
    show();
  });
  ui.namespace.addEventListener("change", () => { address.write({ page: "" }); wake(); });
  for (const [button, step] of [[ui.pageBack, -1], [ui.pageNext, 1]]) {
    button.addEventListener("click", () => { if (isAble(button)) turn(step); });
  }
  ui.rows.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    neighbour(event.target.closest("tr"), step)?.focus();
  });
  addEventListener("popstate", () => {
    ui.filter.value = address.read().filter;
    selected = address.readSelected();
    if (loaded) show();
  });
  // "/" focuses the filter, except while the user types in a field.
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    ui.filter.focus();
    ui.filter.select();
  });
  showSelection();
}
