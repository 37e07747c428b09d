// Shows the body of a response: as text, as indented JSON, as an image, or as
// a download.

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

export function showBody(answer, { name, head, chunks, size, done, over }, remarks) {
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
  if (size > 0 && over) nodes.push(downloadOf(chunks, name));
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
