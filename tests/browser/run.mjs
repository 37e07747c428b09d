#!/usr/bin/env node
// Runs all tests one after the other, each on both devices; prints failures and counts.

import { launch, open } from "./browser.mjs";
import form from "./form.mjs";
import list from "./list.mjs";
import queue from "./queue.mjs";
import away from "./away.mjs";

const words = process.argv.slice(2).join(" ");
const TEST_TIMEOUT_MS = 120_000;
let [passed, failed] = [0, 0];

const browser = await launch();
for (const group of [form, list, queue, away]) {
  const tests = Object.entries(group.tests).filter(([name]) => name.includes(words));
  if (tests.length === 0) continue;
  const world = await group.before();
  for (const device of ["phone", "desktop"]) {
    for (const [name, test] of tests) {
      const tabs = [];
      const tab = async (url) => {
        tabs.push(await open(browser, device, url));
        return tabs.at(-1);
      };
      let timer;
      const timeout = new Promise((_, fail) => { timer = setTimeout(() => fail(new Error("took too long")), TEST_TIMEOUT_MS); });
      try {
        await Promise.race([test({ world, tab, device }), timeout]);
        passed += 1;
        console.log(`ok     ${device}: ${name}`);
      } catch (error) {
        failed += 1;
        console.log(`FAILED ${device}: ${name}\n${error.stack}`);
      }
      clearTimeout(timer);
      for (const { context } of tabs) await context.close();
    }
  }
  await group.after(world);
}
await browser.close();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed || !passed ? 1 : 0;
