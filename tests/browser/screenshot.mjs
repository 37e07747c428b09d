#!/usr/bin/env node
// Makes docs/images/ui.png: the page under /ui/ of `gateway up examples/stack.yaml`, after some calls. `make screenshot`.

import { readFileSync, statSync } from "node:fs";
import path from "node:path";

import { launch, open, showsText } from "./browser.mjs";
import { Up } from "./program.mjs";

const FILE = process.argv[2] ?? "docs/images/ui.png";
const MAX_BYTES = 150_000;

// A stack file refers to files beside it, so the copy in the test directory names the folder of the examples.
const examples = path.resolve("examples");
const stack = readFileSync(path.join(examples, "stack.yaml"), "utf8").replace("perl hello.pl", `perl ${examples}/hello.pl`);
const up = await Up.start(stack);
const browser = await launch();
try {
  await up.waitForState(await up.queue("echo"), "succeeded");
  await up.waitForState(await up.queue("sha512"), "succeeded");
  await up.queue("hello", { "x-delay-seconds": "3600" });
  const { page } = await open(browser, "desktop", `${up.url}/ui/`);
  await showsText(page, "#count", /^4$/);
  await page.click("#rows tr:first-child .pick");
  await page.fill("#body", "hello");
  await page.click("#send");
  await showsText(page, "#summary", /200/);
  await page.mouse.move(0, 0);
  await page.screenshot({ path: FILE, fullPage: true });
} finally {
  await browser.close();
  await up.remove();
}
const { size } = statSync(FILE);
if (size > MAX_BYTES) throw new Error(`${FILE} has ${size} bytes, more than ${MAX_BYTES}`);
console.log(`${FILE}: ${size} bytes`);
