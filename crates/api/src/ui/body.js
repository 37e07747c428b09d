// Shows the body of a response as text, indented JSON, an image or a download.

import { element, ui } from "./dom.js";

export const SHOWN_BYTES = 256 * 1024;

let blobUrl = "";

export function releaseDownload() {
  URL.revokeObjectURL(blobUrl);
}

export function sizeText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1024 ** 2 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 1024 ** 2).toFixed(1)} MiB`;
}

export function showBody(response, { name, head, chunks, size, done, finished }, remarks) {
  const type = response.headers.get("content-type") ?? "";
  const isImage = type.startsWith("image/");
  const cut = !done || size > SHOWN_BYTES;
  const text = isImage ? null : decode(head.subarray(0, Math.min(size, SHOWN_BYTES)), type, cut);
  const nodes = [];
  if (size === 0) nodes.push(note("The body is empty."));
  else if (isImage && done) nodes.push(imageOf(new Blob(chunks, { type })));
  else if (text === null) nodes.push(note(`Binary body${type && ` (${type})`}, not shown.`));
  // The tabindex lets the keyboard scroll it.
  else nodes.push(element("pre", { tabIndex: 0, ariaLabel: "Response body" }, cut ? text : prettyJson(text)));
  if (text !== null && size > SHOWN_BYTES) remarks.push(`Only the first ${sizeText(SHOWN_BYTES)} are shown.`);
  if (size > 0 && finished) nodes.push(downloadOf(chunks, name));
  ui.response.replaceChildren(...nodes);
}

const note = (text) => element("p", { className: "muted" }, text);

// The response of a function must never run as a page of the gateway's origin:
// it is shown as an image element, or offered as application/octet-stream.
function imageOf(blob) {
  const image = element("img", { alt: "Response body", src: URL.createObjectURL(blob) });
  image.addEventListener("error", () => image.replaceWith(note("Not an image this browser can show.")));
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  return image;
}

function downloadOf(chunks, download) {
  blobUrl = URL.createObjectURL(new Blob(chunks, { type: "application/octet-stream" }));
  return element("a", { className: "download", href: blobUrl, download }, "Download the body");
}

// Decodes the bytes as text; null if they are binary.
function decode(bytes, type, cut) {
  const charset = /charset="?([\w:-]+)/i.exec(type)?.[1];
  const isText = /^text\/|json|xml|javascript|urlencoded|yaml/i.test(type);
  if (!isText && bytes.includes(0)) return null;
  try {
    // A truncated body may end inside a character, which `stream` accepts.
    return new TextDecoder(charset ?? "utf-8", { fatal: !isText }).decode(bytes, { stream: cut });
  } catch (error) {
    return error instanceof RangeError ? decode(bytes, type.split(";")[0], cut) : null; // unknown charset
  }
}

// Indents JSON token by token. Serializing the parsed value would change large
// numbers, the order of keys, and duplicate keys.
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
