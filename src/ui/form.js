// The form that describes a call, and what it comes to: a request, a URL and a
// line for curl.

import { chosen, itemOf } from "./list.js";
import { setLines, setText, ui } from "./dom.js";
import { root } from "./poll.js";

// The field that cannot be used, and why.
class Invalid extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function describeUrl() {
  const url = new URL(`function/${encodeURIComponent(chosen())}`, root);
  const start = url.pathname;
  const path = ui.path.value.trim();
  if (path) url.pathname = `${start}/${path.replace(/^\//, "")}`;
  if (url.pathname !== start && !url.pathname.startsWith(`${start}/`)) {
    throw new Invalid("path", "The path must stay below the function.");
  }
  url.search = ui.query.value.trim();
  return url;
}

// What the form says; throws `Invalid` when it makes no sense.
export function describeRequest() {
  const url = describeUrl();
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
  if (!parts) throw new Invalid("headers", `Not a header, which is a name, a colon and a value: ${line.trim()}`);
  const value = parts[2].trim();
  // fetch takes no others.
  if (/[^\t\x20-\xff]/.test(value)) throw new Invalid("headers", `The value of ${parts[1]} has a character that a header cannot have.`);
  return [parts[1], value];
}

export function toRequest({ method, url, headers, body }) {
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

const FIELDS = ["path", "headers"];

// Shows what is wrong beside the field that it is wrong in.
function markField(invalid) {
  for (const field of FIELDS) {
    const wrong = invalid?.field === field;
    setLines(ui[`${field}Error`], wrong ? [invalid.message] : []);
    if (wrong) {
      ui[field].setAttribute("aria-invalid", "true");
      ui[field].setAttribute("aria-describedby", `${field}Error`);
    } else {
      ui[field].removeAttribute("aria-invalid");
      ui[field].removeAttribute("aria-describedby");
    }
  }
}

// Shows what the form comes to; `done` is false while a field is being typed,
// when what is wrong may only be unfinished.
export function preview(done = true) {
  ui.body.disabled = ui.contentType.disabled = ui.method.value === "GET";
  ui.body.placeholder = ui.body.disabled ? "GET has no body" : "";
  let [url, curl, invalid] = ["", "", null];
  try {
    const request = describeRequest();
    curl = curlLine(request);
    url = request.url.href;
  } catch (error) {
    if (!(error instanceof Invalid)) throw error;
    invalid = error;
    if (error.field !== "path") url = describeUrl().href;
  }
  if (done || !invalid) markField(invalid);
  ui.urlLine.hidden = url === "";
  ui.curlLine.hidden = curl === "";
  setText(ui.url, url);
  setText(ui.curl, curl);
  return invalid;
}

export function showSelected(key) {
  ui.unpicked.hidden = key !== "";
  ui.picked.hidden = key === "";
  if (key === "") return;
  setText(ui.callTitle, `Call ${key}`);
  const item = itemOf(key);
  setText(ui.about, item ? item.image ?? "" : "Not in the list right now.");
  preview(document.activeElement?.form !== ui.form);
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

export function start(call) {
  ui.form.addEventListener("input", () => preview(false));
  // A message moves what is below it, and so the button under a pointer that is being pressed.
  ui.form.addEventListener("focusout", ({ relatedTarget }) => preview(relatedTarget !== ui.send));
  const submit = (event) => {
    event.preventDefault();
    const invalid = preview();
    if (invalid) ui[invalid.field].focus();
    else call();
  };
  ui.form.addEventListener("submit", submit);
  ui.form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  });
  for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
}
