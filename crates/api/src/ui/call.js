// Sends the request that the form describes, and shows the response.

import { SHOWN_BYTES, releaseDownload, showBody, sizeText } from "./body.js";
import { element, setLines, setText, ui } from "./dom.js";
import { describeRequest, toRequest } from "./form.js";
import { selectedKey } from "./list.js";

const MAX_BODY_BYTES = 32 * 1024 * 1024;

let running = null;

export async function call() {
  if (running || selectedKey() === "") return;
  let [description, request] = [];
  try {
    description = describeRequest();
    request = toRequest(description);
    setLines(ui.invalid, []);
  } catch (error) {
    setLines(ui.invalid, [`The browser cannot send this request: ${error.message}`]);
    return;
  }
  const received = { name: selectedKey(), head: new Uint8Array(SHOWN_BYTES), chunks: [], size: 0, done: false, finished: false };
  const remarks = [];
  const dropped = description.headers.map(([name]) => name).filter((name) => !request.headers.has(name));
  if (dropped.length) remarks.push(`The browser does not let a page send: ${dropped.join(", ")}`);
  running = new AbortController();
  const started = performance.now();
  const timer = setInterval(() => showRunning(started), 100);
  showRunning(started);
  clearResult(`${description.method} ${description.url.pathname}${description.url.search}`);
  let response = null;
  try {
    response = await fetch(request, { signal: running.signal });
    if (response.redirected) remarks.push(`Redirected to ${response.url}`);
    setText(ui.headerLines, [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n"));
    ui.responseHeaders.hidden = false;
    await readBody(response, received);
    received.done = true;
    if (received.size > MAX_BODY_BYTES) remarks.push(`Reading stopped after ${sizeText(received.size)}.`);
  } catch (error) {
    if (error.name === "AbortError") remarks.push(response ? "Cancelled while the body was being received." : "Cancelled.");
    else if (response) remarks.push("The connection was closed while the body was being received.");
    else remarks.push("No response: the gateway cannot be reached, or the function redirected to another site.");
  }
  clearInterval(timer);
  running = null;
  received.finished = true;
  showIdle();
  showSummary(response, performance.now() - started, received.size);
  if (response) showBody(response, received, remarks);
  setLines(ui.remarks, remarks);
}

// Reads the body up to MAX_BODY_BYTES; text is shown as it arrives.
async function readBody(response, received) {
  const reader = response.body?.getReader();
  let painted = performance.now();
  while (reader && received.size <= MAX_BODY_BYTES) {
    const { done, value } = await reader.read();
    if (done) return;
    const room = Math.max(0, SHOWN_BYTES - received.size);
    received.head.set(value.subarray(0, room), Math.min(received.size, SHOWN_BYTES));
    received.chunks.push(value);
    received.size += value.length;
    if (room && performance.now() - painted > 250) {
      showBody(response, received, []);
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
  releaseDownload();
  setText(ui.requestLine, title);
  ui.summary.replaceChildren("Running…");
  ui.response.replaceChildren();
  setLines(ui.remarks, []);
  ui.responseHeaders.hidden = true;
  ui.result.hidden = false;
}

function showSummary(response, ms, size) {
  const className = response ? `status s${Math.floor(response.status / 100)}` : "status";
  const status = response ? `${response.status} ${response.statusText}`.trim() : "no response";
  const parts = [element("strong", { className }, status), element("span", {}, `${ms.toFixed(ms < 10 ? 1 : 0)} ms`)];
  if (response) parts.push(element("span", {}, sizeText(size)));
  const id = response?.headers.get("x-call-id");
  if (id) parts.push(element("span", { className: "id" }, `X-Call-Id ${id}`));
  ui.summary.replaceChildren(...parts.flatMap((part) => [part, " "]));
}

export function cancel() {
  running?.abort();
}
