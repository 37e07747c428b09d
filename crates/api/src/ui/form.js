// The call form, and the request, URL and curl command line that it describes.

import { itemOf, selectedKey } from "./list.js";
import { setLines, setText, ui } from "./dom.js";
import { root } from "./poll.js";

// A field has an invalid value.
class Invalid extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function describeUrl() {
  const url = new URL(`function/${encodeURIComponent(selectedKey())}`, root);
  const start = url.pathname;
  const path = ui.path.value.trim();
  if (path) url.pathname = `${start}/${path.replace(/^\//, "")}`;
  if (url.pathname !== start && !url.pathname.startsWith(`${start}/`)) {
    throw new Invalid("path", "The path must stay below the function.");
  }
  url.search = ui.query.value.trim();
  return url;
}

// Reads the form; throws `Invalid` when a field has an invalid value.
export function describeRequest() {
  const url = describeUrl();
  const method = ui.method.value;
  const headers = ui.headers.value.split("\n").filter((line) => line.trim()).map(parseHeader);
  const type = ui.contentType.value.trim();
  if (method === "GET") return { method, url, headers, body: "" }; // fetch does not allow a body with GET
  if (type && !isTyped(headers)) headers.unshift(["Content-Type", type]);
  return { method, url, headers, body: ui.body.value };
}

const isTyped = (headers) => headers.some(([name]) => name.toLowerCase() === "content-type");

function parseHeader(line) {
  const parts = /^\s*([\w!#$%&'*+.^`|~-]+)\s*:(.*)$/.exec(line);
  if (!parts) throw new Invalid("headers", `Not a header (name, colon, value): ${line.trim()}`);
  const value = parts[2].trim();
  // fetch accepts no other characters.
  if (/[^\t\x20-\xff]/.test(value)) throw new Invalid("headers", `The value of ${parts[1]} has a character that a header cannot have.`);
  return [parts[1], value];
}

export function toRequest({ method, url, headers, body }) {
  // Sent as bytes: fetch would add a Content-Type to a string.
  const bytes = body ? new TextEncoder().encode(body) : undefined;
  return new Request(url, { method, headers, body: bytes, cache: "no-store" });
}

const shellQuote = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

function curlLine({ method, url, headers, body }) {
  const words = ["curl"];
  if (/[[\]{}]/.test(url.href)) words.push("-g"); // curl would expand them
  if (method !== "GET") words.push("-X", method);
  // "Name;" makes curl send an empty header.
  for (const [name, value] of headers) words.push("-H", value ? `${name}: ${value}` : `${name};`);
  if (body || ["POST", "PUT", "PATCH"].includes(method)) {
    if (!isTyped(headers)) words.push("-H", "Content-Type:"); // curl would set the type of a form
    words.push("--data-raw", body); // --data would read a file for "@name"
  }
  return [...words.map(shellQuote), shellQuote(url.href)].join(" ");
}

const FIELDS = ["path", "headers"];

// Shows the message beside the invalid field.
function markField(invalid) {
  for (const field of FIELDS) {
    const isInvalid = invalid?.field === field;
    setLines(ui[`${field}Error`], isInvalid ? [invalid.message] : []);
    if (isInvalid) {
      ui[field].setAttribute("aria-invalid", "true");
      ui[field].setAttribute("aria-describedby", `${field}Error`);
    } else {
      ui[field].removeAttribute("aria-invalid");
      ui[field].removeAttribute("aria-describedby");
    }
  }
}

// Shows the URL and the curl command line. `done` is false while the user types:
// an invalid value may only be incomplete then, and is not marked.
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
  ui.unselected.hidden = key !== "";
  ui.selected.hidden = key === "";
  if (key === "") return;
  setText(ui.callTitle, `Call ${key}`);
  const item = itemOf(key);
  setText(ui.about, item ? item.image ?? "" : "Not in the list at present.");
  preview(document.activeElement?.form !== ui.form);
}

async function copy(button) {
  const source = ui[button.dataset.copies];
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // The clipboard API is not available over plain HTTP from another machine.
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

export function start(call) {
  ui.form.addEventListener("input", () => preview(false));
  // A message moves the elements below it: it must not move the button while it is being pressed.
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
