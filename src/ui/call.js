// Makes the call that the form describes, and shows what comes back.

import { SHOWN_BYTES, releaseDownload, showBody, sizeText } from "./body.js";
import { element, setLines, setText, ui } from "./dom.js";
import { describeRequest, toRequest } from "./form.js";
import { chosen } from "./list.js";

const KEPT_BYTES = 32 * 1024 * 1024;

let running = null;

export async function call() {
  if (running || chosen() === "") return;
  let [described, request] = [];
  try {
    described = describeRequest();
    request = toRequest(described);
    setLines(ui.invalid, []);
  } catch (error) {
    setLines(ui.invalid, [`The browser cannot send this request: ${error.message}`]);
    return;
  }
  const taken = { name: chosen(), head: new Uint8Array(SHOWN_BYTES), chunks: [], size: 0, done: false, over: false };
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
  taken.over = true;
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
  releaseDownload();
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

export function cancel() {
  running?.abort();
}
