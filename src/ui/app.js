// The page of the gateway: it lists the functions, live, and calls the one
// that is selected. Text from the API only ever enters the page as text.

import { onQueueFilter, pollQueue } from "./queue.js";

const POLL_MS = 2000;
const RETRY_MAX_MS = 30_000;
const TIMEOUT_MS = 10_000;
const SLOW_TURNS = 15; // version and namespaces are asked every so many polls
const SHOWN_BYTES = 256 * 1024;
const KEPT_BYTES = 32 * 1024 * 1024;

// Every element with an id, under that id.
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));

// The API lies beside /ui/, also when a proxy serves both under a prefix.
// fetch refuses URLs with a login inside, which the page's own may have.
const root = new URL("../", import.meta.url);
root.username = root.password = "";

const element = (tag, props, text = "") =>
  Object.assign(document.createElement(tag), { textContent: text }, props);

// Writing only what changed keeps the user's text selection and avoids flicker.
const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

const setLines = (node, lines) => {
  setText(node, lines.join("\n"));
  node.hidden = lines.length === 0;
};

const asList = (value) => (Array.isArray(value) ? value : []);

// ---------------------------------------------------------------- polling

const ask = (path) =>
  fetch(new URL(path, root), { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });

async function askJson(path) {
  const answer = await ask(path);
  if (answer.ok) return answer.json();
  await answer.body?.cancel();
  throw Object.assign(new Error(`status ${answer.status}`), { status: answer.status });
}

let hurry = false;
let endSleep = () => {};

function sleep(ms) {
  if (hurry) return undefined;
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    endSleep = () => { clearTimeout(timer); done(); };
  });
}

// Makes the next poll start at once, or right after the one under way.
function wake() {
  hurry = true;
  endSleep();
}

const shown = () =>
  new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));

// One loop asks everything, one request after the other, so that no two
// polls can overlap however slow the gateway is.
async function pollForever() {
  let wait = POLL_MS;
  for (let turn = 0; ; ) {
    while (document.hidden) await shown();
    hurry = false;
    try {
      await poll(turn % SLOW_TURNS === 0);
      turn += 1;
      wait = POLL_MS;
      ui.trouble.hidden = true;
    } catch (error) {
      wait = turn === 0 ? Math.min(wait * 2, RETRY_MAX_MS) : POLL_MS;
      turn = 0; // it may come back as another version
      showTrouble(error, wait);
    }
    await sleep(wait);
  }
}

async function poll(everything) {
  await pollHealth();
  if (everything) {
    // Neither is worth losing the list for.
    await askJson("system/info").then(showInfo, () => {});
    await askJson("system/namespaces").then(showNamespaces, () => {});
  }
  const namespace = ui.namespace.value;
  const query = namespace ? `?${new URLSearchParams({ namespace })}` : "";
  const list = await askJson(`system/functions${query}`);
  // The user may have chosen another namespace while this one was answered.
  if (namespace === ui.namespace.value) showFunctions(asList(list));
  await pollQueue(root, askJson);
}

function showTrouble({ status }, wait) {
  if (!status) showHealth("unknown", "unreachable", []);
  const refused = `The gateway refuses the list of functions (status ${status}).`;
  const what = status ? refused : "The gateway cannot be reached.";
  setText(ui.troubleText, `${what} Trying again in ${wait / 1000} s.`);
  ui.trouble.hidden = false;
}

async function pollHealth() {
  const answer = await ask("_/ready"); // 503 is an answer too
  const state = (await answer.json().catch(() => null)) ?? {};
  const reasons = asList(state.reasons).map(String);
  const degraded = asList(state.degraded).map((text) => `degraded: ${text}`);
  if (!answer.ok) showHealth("down", "not ready", [...reasons, ...degraded]);
  else if (degraded.length) showHealth("partly", "degraded", degraded);
  else showHealth("up", "ready", []);
}

function showHealth(level, text, reasons) {
  ui.health.dataset.level = level;
  setText(ui.healthText, text);
  setLines(ui.reasons, reasons);
}

function showInfo(info) {
  const { release, sha, commit_message: message } = info?.version ?? {};
  const parts = [release, sha?.slice(0, 7), info?.provider?.provider, info?.arch];
  setText(ui.version, parts.filter(Boolean).join(" · "));
  ui.version.title = message ?? "";
}

function showNamespaces(list) {
  const names = asList(list).map(String).sort();
  const before = ui.namespace.value;
  const old = [...ui.namespace.options].map((option) => option.value);
  ui.namespaceField.hidden = names.length < 2;
  if (names.join() === old.join()) return;
  ui.namespace.replaceChildren(...names.map((name) => new Option(name)));
  const wanted = [before, selected.split(".")[1], "openfaas-fn"].find((name) => names.includes(name));
  if (wanted) ui.namespace.value = wanted;
}

// ------------------------------------------------------------ the list

const rows = new Map(); // key -> { tr, item }

// What stands in the URL is also unique in the list.
const keyOf = (item) => (item.namespace ? `${item.name}.${item.namespace}` : String(item.name));

function readFragment() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}
let selected = readFragment();

function showFunctions(list) {
  const byKey = new Map(list.filter((item) => item?.name).map((item) => [keyOf(item), item]));
  for (const [key, row] of rows) if (!byKey.has(key)) removeRow(key, row.tr);
  // In a sorted list the rows that stay never move, so focus stays with them.
  let next = ui.rows.firstElementChild;
  for (const key of [...byKey.keys()].sort()) {
    const row = rows.get(key) ?? newRow(key);
    if (row.tr === next) next = next.nextElementSibling;
    else ui.rows.insertBefore(row.tr, next);
    fillRow(row, byKey.get(key));
  }
  ui.loading.hidden = true;
  applyFilter();
  showSelection();
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

function fillRow(row, item) {
  row.item = item;
  const cell = (selector) => row.tr.querySelector(selector);
  const [replicas, available] = [item.replicas ?? 0, item.availableReplicas ?? 0];
  const image = item.image ?? "";
  const state = !replicas && !available ? "zero" : !replicas || available < replicas ? "scaling" : "ready";
  setText(cell(".pick"), item.name);
  setText(cell(".image"), image);
  cell(".image").title = image;
  setText(cell(".replicas"), `${available}/${replicas}`);
  setText(cell(".calls"), (item.invocationCount ?? 0).toLocaleString());
  setText(cell(".state"), state);
  cell(".state").dataset.state = state;
}

function applyFilter() {
  const words = ui.filter.value.toLowerCase().split(/\s+/);
  let matching = 0;
  for (const { tr, item } of rows.values()) {
    const text = `${item.name} ${item.image ?? ""}`.toLowerCase();
    tr.hidden = !words.every((word) => text.includes(word));
    if (!tr.hidden) matching += 1;
  }
  setText(ui.count, matching === rows.size ? String(rows.size) : `${matching} of ${rows.size}`);
  ui.table.hidden = matching === 0;
  ui.empty.hidden = rows.size > 0 || !ui.loading.hidden;
  ui.nomatch.hidden = rows.size === 0 || matching > 0;
}

function neighbour(tr, step) {
  let other = tr;
  do other = step > 0 ? other.nextElementSibling : other.previousElementSibling;
  while (other?.hidden);
  return other?.querySelector(".pick");
}

function select(key) {
  selected = key;
  history.replaceState(null, "", `#${encodeURIComponent(key)}`); // survives a reload
  ui.invalid.hidden = true;
  showSelection();
  // On a narrow screen the form lies below the list, out of sight.
  if (ui.caller.getBoundingClientRect().top > innerHeight - 120) ui.caller.scrollIntoView();
}

function showSelection() {
  for (const [key, { tr }] of rows) {
    tr.classList.toggle("selected", key === selected);
    tr.querySelector(".pick").setAttribute("aria-pressed", String(key === selected));
  }
  ui.unpicked.hidden = selected !== "";
  ui.picked.hidden = selected === "";
  if (selected === "") return;
  setText(ui.callTitle, `Call ${selected}`);
  const row = rows.get(selected);
  setText(ui.about, row ? row.item.image ?? "" : "Not in the list right now.");
  preview();
}

// ------------------------------------------------------ the request

// What the form says; throws with a message for the user when it makes no sense.
function describeRequest() {
  const url = new URL(`function/${encodeURIComponent(selected)}`, root);
  const start = url.pathname;
  const path = ui.path.value.trim();
  if (path) url.pathname = `${start}/${path.replace(/^\//, "")}`;
  if (url.pathname !== start && !url.pathname.startsWith(`${start}/`)) {
    throw new Error("The path must stay below the function.");
  }
  url.search = ui.query.value.trim();
  const method = ui.method.value;
  const headers = ui.headers.value.split("\n").filter((line) => line.trim()).map(parseHeader);
  const type = ui.contentType.value.trim();
  if (method === "GET") return { method, url, headers, body: "" }; // fetch allows none there
  if (type && !isTyped(headers)) headers.unshift(["Content-Type", type]);
  return { method, url, headers, body: ui.body.value };
}

const isTyped = (headers) => headers.some(([name]) => name.toLowerCase() === "content-type");

function parseHeader(line) {
  const parts = /^\s*([\w!#$%&'*+.^`|~-]+)\s*:(.*)$/.exec(line);
  if (!parts) throw new Error(`Not a header line: ${line.trim()}`);
  return [parts[1], parts[2].trim()];
}

function toRequest({ method, url, headers, body }) {
  // As bytes, since fetch would add a content type of its own to a string.
  const bytes = body ? new TextEncoder().encode(body) : undefined;
  return new Request(url, { method, headers, body: bytes, cache: "no-store" });
}

const shellQuote = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

function curlLine({ method, url, headers, body }) {
  const words = ["curl"];
  if (/[[\]{}]/.test(url.href)) words.push("-g"); // else curl expands them
  if (method !== "GET") words.push("-X", method);
  // "Name;" is how curl is told to send an empty header instead of none.
  for (const [name, value] of headers) words.push("-H", value ? `${name}: ${value}` : `${name};`);
  if (body || ["POST", "PUT", "PATCH"].includes(method)) {
    if (!isTyped(headers)) words.push("-H", "Content-Type:"); // else curl claims a form
    words.push("--data-raw", body); // --data would read a file for "@name"
  }
  return [...words.map(shellQuote), shellQuote(url.href)].join(" ");
}

function preview() {
  ui.body.disabled = ui.contentType.disabled = ui.method.value === "GET";
  ui.body.placeholder = ui.body.disabled ? "GET has no body" : "";
  let [url, curl] = ["", ""];
  try {
    const request = describeRequest();
    [url, curl] = [request.url.href, curlLine(request)];
  } catch (error) {
    url = error.message;
  }
  setText(ui.url, url);
  setText(ui.curl, curl);
}

async function copy(button) {
  const source = ui[button.dataset.copies];
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Plain http from another machine has no clipboard API.
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ------------------------------------------------------- the call

let running = null;
let blobUrl = "";

async function call() {
  if (running || selected === "") return;
  let [described, request] = [];
  try {
    described = describeRequest();
    request = toRequest(described);
    setLines(ui.invalid, []);
  } catch (error) {
    setLines(ui.invalid, [error.message]);
    return;
  }
  const taken = { name: selected, head: new Uint8Array(SHOWN_BYTES), chunks: [], size: 0, done: false };
  const remarks = [];
  const dropped = described.headers.map(([name]) => name).filter((name) => !request.headers.has(name));
  if (dropped.length) remarks.push(`Browsers do not let a page send: ${dropped.join(", ")}`);
  running = new AbortController();
  const started = performance.now();
  const clock = setInterval(() => showRunning(started), 100);
  showRunning(started);
  clearResult(`${described.method} ${described.url.pathname}${described.url.search}`);
  let answer = null;
  try {
    answer = await fetch(request, { signal: running.signal });
    if (answer.redirected) remarks.push(`Redirected to ${answer.url}`);
    setText(ui.headerLines, [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n"));
    ui.answerHeaders.hidden = false;
    await take(answer, taken);
    taken.done = true;
    if (taken.size > KEPT_BYTES) remarks.push(`Reading stopped after ${sizeText(taken.size)}.`);
  } catch (error) {
    if (error.name === "AbortError") remarks.push(answer ? "Cancelled while the body arrived." : "Cancelled.");
    else if (answer) remarks.push("The connection broke off while the body arrived.");
    else remarks.push("No answer: the gateway cannot be reached, or the function redirected to another site.");
  }
  clearInterval(clock);
  running = null;
  showIdle();
  showSummary(answer, performance.now() - started, taken.size);
  if (answer) showBody(answer, taken, remarks);
  setLines(ui.remarks, remarks);
}

// Reads the body to its end, or to the bound; text is shown as it arrives.
async function take(answer, taken) {
  const reader = answer.body?.getReader();
  let painted = performance.now();
  while (reader && taken.size <= KEPT_BYTES) {
    const { done, value } = await reader.read();
    if (done) return;
    const room = Math.max(0, SHOWN_BYTES - taken.size);
    taken.head.set(value.subarray(0, room), Math.min(taken.size, SHOWN_BYTES));
    taken.chunks.push(value);
    taken.size += value.length;
    if (room && performance.now() - painted > 250) {
      showBody(answer, taken, []);
      painted = performance.now();
    }
  }
  await reader?.cancel();
}

function showRunning(started) {
  ui.send.setAttribute("aria-disabled", "true");
  ui.cancel.hidden = false;
  ui.hint.textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
}

function showIdle() {
  ui.send.removeAttribute("aria-disabled");
  if (document.activeElement === ui.cancel) ui.send.focus();
  ui.cancel.hidden = true;
  ui.hint.textContent = "or Ctrl+Enter";
}

function clearResult(title) {
  URL.revokeObjectURL(blobUrl);
  setText(ui.asked, title);
  ui.summary.replaceChildren("Running…");
  ui.answer.replaceChildren();
  setLines(ui.remarks, []);
  ui.answerHeaders.hidden = true;
  ui.result.hidden = false;
}

function showSummary(answer, ms, size) {
  const className = answer ? `status s${Math.floor(answer.status / 100)}` : "status";
  const status = answer ? `${answer.status} ${answer.statusText}`.trim() : "no answer";
  const parts = [element("strong", { className }, status), element("span", {}, `${ms.toFixed(ms < 10 ? 1 : 0)} ms`)];
  if (answer) parts.push(element("span", {}, sizeText(size)));
  const id = answer?.headers.get("x-call-id");
  if (id) parts.push(element("span", { className: "id" }, `X-Call-Id ${id}`));
  ui.summary.replaceChildren(...parts.flatMap((part) => [part, " "]));
}

function sizeText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1024 ** 2 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 1024 ** 2).toFixed(1)} MiB`;
}

function showBody(answer, { name, head, chunks, size, done }, remarks) {
  const type = answer.headers.get("content-type") ?? "";
  const isImage = type.startsWith("image/");
  const cut = !done || size > SHOWN_BYTES;
  const text = isImage ? null : decode(head.subarray(0, Math.min(size, SHOWN_BYTES)), type, cut);
  const nodes = [];
  if (size === 0) nodes.push(note("The body is empty."));
  else if (isImage && done) nodes.push(imageOf(new Blob(chunks, { type })));
  else if (text === null) nodes.push(note(`Binary body${type && ` (${type})`}, not shown.`));
  // With a tabindex, so that the keyboard can scroll it.
  else nodes.push(element("pre", { tabIndex: 0, ariaLabel: "Answer body" }, cut ? text : prettyJson(text)));
  if (text !== null && size > SHOWN_BYTES) remarks.push(`Only the first ${sizeText(SHOWN_BYTES)} are shown.`);
  if (size > 0 && !running) nodes.push(downloadOf(chunks, name));
  ui.answer.replaceChildren(...nodes);
}

const note = (text) => element("p", { className: "muted" }, text);

// What a function answers must never run as a page of the gateway's origin:
// it becomes a plain image element, or a download of no particular type.
function imageOf(blob) {
  const image = element("img", { alt: "Answer body", src: URL.createObjectURL(blob) });
  image.addEventListener("error", () => image.replaceWith(note("Not an image this browser can show.")));
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  return image;
}

function downloadOf(chunks, download) {
  blobUrl = URL.createObjectURL(new Blob(chunks, { type: "application/octet-stream" }));
  return element("a", { className: "download", href: blobUrl, download }, "Download the body");
}

// The text of the bytes, or null when they are not text.
function decode(bytes, type, cut) {
  const charset = /charset="?([\w:-]+)/i.exec(type)?.[1];
  const sure = /^text\/|json|xml|javascript|urlencoded|yaml/i.test(type);
  if (!sure && bytes.includes(0)) return null;
  try {
    // As a stream where the end is missing: it may be within a character.
    return new TextDecoder(charset ?? "utf-8", { fatal: !sure }).decode(bytes, { stream: cut });
  } catch (error) {
    return error instanceof RangeError ? decode(bytes, type.split(";")[0], cut) : null; // unknown charset
  }
}

// Indents JSON token by token. Writing out the parsed value again would
// change large numbers, the order of keys, and keys that come twice.
function prettyJson(text) {
  if (!/^\s*[[{]/.test(text)) return text;
  try { JSON.parse(text); } catch { return text; }
  let [out, depth, opened] = ["", 0, false];
  const newLine = () => `\n${"  ".repeat(Math.min(depth, 40))}`;
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g)) {
    const closes = token === "}" || token === "]";
    if (closes) depth -= 1;
    if (opened !== closes) out += newLine();
    out += token;
    opened = token === "{" || token === "[";
    if (opened) depth += 1;
    if (token === ",") out += newLine();
    if (token === ":") out += " ";
  }
  return out;
}

// ------------------------------------------------------------ wiring

ui.rows.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  neighbour(event.target.closest("tr"), step)?.focus();
});
ui.filter.addEventListener("input", applyFilter);
ui.namespace.addEventListener("change", wake);
ui.retry.addEventListener("click", wake);
onQueueFilter(wake);
addEventListener("online", wake);
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
ui.form.addEventListener("input", preview);
ui.form.addEventListener("submit", (event) => { event.preventDefault(); call(); });
ui.form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); call(); }
});
ui.cancel.addEventListener("click", () => running?.abort());
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));

const gateway = root.href.replace(/\/$/, "");
ui.deployLine.textContent = `faas-cli deploy --gateway ${gateway} \\\n  --name hello --image IMAGE`;
ui.deployStack.textContent = `faas-cli deploy --gateway ${gateway} -f stack.yaml`;
showSelection();
pollForever();
