// Starts the program under test: the real binary, in the role that a test needs, with a separate state directory.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const binary = path.resolve(process.env.GATEWAY ?? "target/debug/gateway");
const DEADLINE_MS = 30_000;

// Waits until `holds` is true, and fails with `what` if it never is.
export async function eventually(what, holds) {
  for (const end = Date.now() + DEADLINE_MS; ; await sleep(50)) {
    if (await holds()) return;
    if (Date.now() > end) throw new Error(`never: ${what}`);
  }
}

export const freePort = () =>
  new Promise((done, failed) => {
    const server = net.createServer().once("error", failed);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => done(port));
    });
  });

// A process of the program. `stop` terminates it and its child processes.
export class Program {
  constructor(args, settings = {}) {
    this.args = args;
    this.settings = settings;
    this.output = "";
  }

  async start(url) {
    const environment = { PATH: process.env.PATH, HOME: tmpdir(), ...this.settings };
    this.child = spawn(binary, this.args, { env: environment, cwd: this.settings.cwd, stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [this.child.stdout, this.child.stderr]) stream.on("data", (text) => { this.output += text; });
    this.ended = new Promise((done) => this.child.once("exit", done));
    await eventually(`${this.args.join(" ")} serves`, async () => {
      if (this.child.exitCode !== null) throw new Error(`the process exited: ${this.output}`);
      return fetch(url).then(() => true, () => false);
    });
    return this;
  }

  async stop(signal = "SIGTERM") {
    this.child.kill(signal);
    await this.ended;
  }
}

// `gateway up` with the functions of a stack file. It can be restarted on the same port.
export class Up {
  static async start(stack) {
    const up = new Up();
    up.directory = mkdtempSync(path.join(tmpdir(), "gateway-browser-"));
    up.port = await freePort();
    up.url = `http://127.0.0.1:${up.port}`;
    writeFileSync(path.join(up.directory, "stack.yaml"), stack);
    await up.restart();
    return up;
  }

  async restart() {
    this.program = new Program(["up", path.join(this.directory, "stack.yaml")], {
      cwd: this.directory, port: String(this.port), metrics_port: "0", provider_port: "0", shutdown_grace: "1s",
    });
    await this.program.start(`${this.url}/_/healthz`);
  }

  get = async (target) => (await fetch(this.url + target)).json();

  // Queues a call and returns its id.
  async queue(name, headers = {}) {
    const response = await fetch(`${this.url}/async-function/${name}`, { method: "POST", headers, body: "x" });
    if (response.status !== 202) throw new Error(`${response.status}: ${await response.text()}`);
    return response.headers.get("x-call-id");
  }

  waitForState = (id, state) =>
    eventually(`call ${id} is ${state}`, async () => (await this.get(`/async-function/${id}`)).state === state);

  async stop(signal) {
    await this.program.stop(signal);
  }

  async remove() {
    await this.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }
}
