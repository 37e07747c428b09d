// Pages in a real Chromium, on a phone and on a desktop, each with its console and its breaches of the policy recorded.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.BROWSER_MODULES}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

export const VIEWPORTS = {
  phone: { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 },
  desktop: { viewport: { width: 1280, height: 800 } },
};

const ARGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

// A browser with a fresh user data directory.
export const launch = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: ARGS });

// A tab on the page of `url`. What the network says of requests that fail is expected where a test takes the gateway
// away; every other line of the console is an error.
export async function open(browser, device, url) {
  const context = await browser.newContext(VIEWPORTS[device]);
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(`error: ${error}`));
  page.on("console", (message) => {
    const text = message.text();
    if (/^Failed to load resource/.test(text)) return;
    if (["error", "warning"].includes(message.type())) faults.push(`${message.type()}: ${text}`);
  });
  await page.addInitScript(() => {
    globalThis.breaches = [];
    document.addEventListener("securitypolicyviolation", (event) => {
      globalThis.breaches.push(`${event.violatedDirective}: ${event.blockedURI}`);
    });
  });
  page.setDefaultTimeout(20_000);
  await page.goto(url);
  return { page, context, faults, device };
}

// Checks what has to hold in every state: no violation of the accessibility rules in light and dark, nothing wider
// than the screen, nothing in the console, no breach of the policy.
export async function check({ page, faults, device }, state) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
    const told = violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html}: ${node.failureSummary}`));
    assert.deepEqual(told, [], `${state}, ${colorScheme}`);
    if (process.env.SCREENSHOTS) {
      mkdirSync(process.env.SCREENSHOTS, { recursive: true });
      const path = `${process.env.SCREENSHOTS}/${device}-${state.replaceAll(/\W+/g, "-")}-${colorScheme}.png`;
      await page.screenshot({ path, fullPage: true });
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  const [wide, screen] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(wide <= screen, `${state}: the page is ${wide} px wide on a screen of ${screen} px`);
  const cut = await page.evaluate(() =>
    [...document.querySelectorAll(".card")].filter((card) => card.scrollWidth > card.clientWidth + 1).map((card) => card.id));
  assert.deepEqual(cut, [], `${state}: wider than its card`);
  assert.deepEqual([...faults, ...(await page.evaluate(() => globalThis.breaches))], [], state);
}

export const text = (page, selector) => page.locator(selector).innerText();

// Waits until the element says something that matches.
export async function says(page, selector, pattern) {
  const holds = ([selector, source]) => {
    const node = document.querySelector(selector);
    return node && node.checkVisibility() && new RegExp(source, "s").test(node.innerText);
  };
  try {
    await page.waitForFunction(holds, [selector, pattern.source]);
  } catch (error) {
    const said = await page.locator(selector).innerText().catch(() => "");
    throw new Error(`${selector} says ${JSON.stringify(said)}, never ${pattern}`, { cause: error });
  }
}

export const background = (locator) => locator.evaluate((node) => getComputedStyle(node).backgroundColor);
