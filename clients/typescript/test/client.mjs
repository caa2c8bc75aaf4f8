// Checks of the built client against the server of ROCK_BASE_URL; prints one line of JSON for each check.

import assert from "node:assert/strict";
import http from "node:http";
import * as rock from "../dist/index.js";

const IMAGE = process.env.ROCK_TEST_IMAGE ?? "host";
const client = new rock.Client();
let failed = 0;

async function check(name, act) {
  let reason = "";
  try {
    await act();
  } catch (error) {
    failed += 1;
    reason = String(error?.stack ?? error).slice(0, 800) || "failed";
  }
  console.log(JSON.stringify({ check: name, reason }));
}

/** A server between client and server. lose(request) is true for a request whose response is lost. */
async function between(lose) {
  const seen = [];
  const target = new URL(process.env.ROCK_BASE_URL);
  const server = http.createServer((request, response) => {
    seen.push([request.method, request.url, request.headers["idempotency-key"]]);
    const onward = http.request({ host: target.hostname, port: target.port, path: request.url, method: request.method,
      headers: { ...request.headers, host: target.host } }, (answer) => {
      const parts = [];
      answer.on("data", (part) => parts.push(part));
      answer.on("end", () => {
        if (lose(request)) return request.socket.destroy();
        response.writeHead(answer.statusCode, answer.headers);
        response.end(Buffer.concat(parts));
      });
    });
    request.pipe(onward);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}`, seen, close: () => server.close() };
}

const sandbox = await rock.Sandbox.create({ image: IMAGE, memory: "512m", cpus: 1, labels: { test: "typescript" } });
try {
  await check("a sandbox has a state and labels", async () => {
    const info = await sandbox.info();
    assert.equal(info.state, "running");
    assert.deepEqual(info.labels, { test: "typescript" });
  });
  await check("a sandbox is listed and connected to", async () => {
    const found = [];
    for await (const info of client.listSandboxes({ states: ["running"], label: "test=typescript" })) found.push(info);
    assert.deepEqual(found.map((info) => info.sandbox_id), [sandbox.id]);
    assert.equal((await client.connect(sandbox.id)).id, sandbox.id);
  });
  await check("the server has a version", async () => assert.ok((await client.serverInfo()).version));
  await check("a session keeps its directory and variables", async () => {
    await sandbox.run("cd /tmp && export WORD=kept");
    const result = await sandbox.run("echo $WORD $PWD; exit_code() { return 3; }; exit_code");
    assert.equal(result.output.trim(), "kept /tmp");
    assert.equal(result.exit_code, 3);
  });
  await check("a session of its own", async () => {
    await sandbox.sessions.create("second", { env: { ONE: "1" } });
    assert.equal((await sandbox.run("echo $ONE", { session: "second" })).output.trim(), "1");
    assert.ok((await sandbox.sessions.list()).length >= 1);
    await sandbox.sessions.close("second");
  });
  await check("a program has separate outputs and an exit code", async () => {
    const result = await sandbox.exec(["sh", "-c", "echo out; echo err >&2; exit 7"], { env: { A: "b" } });
    assert.deepEqual([result.stdout, result.stderr, result.exit_code], ["out\n", "err\n", 7]);
  });
  await check("a program gets its standard input", async () => {
    assert.equal((await sandbox.exec(["cat"], { stdin: "grüße" })).stdout, "grüße");
  });
  await check("a timeout is a result", async () => {
    const result = await sandbox.exec(["sleep", "30"], { timeout: 0.5 });
    assert.equal(result.timed_out, true);
  });
  await check("a stream has output while the program runs", async () => {
    const stream = sandbox.stream(["sh", "-c", "echo first; read x < /tmp/go.fifo 2>/dev/null; echo 'zwölf' >&2; exit 4"]);
    const chunks = [];
    await sandbox.exec(["mkfifo", "/tmp/go.fifo"]);
    for await (const chunk of stream) {
      chunks.push(chunk);
      if (chunk.text === "first\n") await sandbox.exec(["sh", "-c", "echo > /tmp/go.fifo"]);
    }
    assert.deepEqual(chunks.map((chunk) => [chunk.kind, chunk.text]), [["stdout", "first\n"], ["stderr", "zwölf\n"]]);
    assert.equal(stream.result.exit_code, 4);
  });
  await check("a stream that is left kills its program", async () => {
    for await (const chunk of sandbox.stream(["sh", "-c", "echo $$; exec sleep 997"])) {
      var pid = chunk.text.trim();
      break;
    }
    for (const end = Date.now() + 15000; ;) {
      if ((await sandbox.exec(["sh", "-c", `kill -0 ${pid}`])).exit_code !== 0) break;
      assert.ok(Date.now() < end, "the program still runs");
    }
  });
  await check("a background process", async () => {
    const process = await sandbox.processes.start(["sh", "-c", "read line; echo got $line; sleep 60"]);
    await process.write("word\n");
    let text = "";
    for await (const part of process.follow()) {
      text += Buffer.from(part);
      if (text.includes("\n")) break;
    }
    assert.equal(text, "got word\n");
    assert.equal((await process.wait(0)).running, true);
    await process.kill();
    assert.equal((await process.wait(20)).running, false);
    assert.ok((await sandbox.processes.list()).some((one) => one.id === process.id));
    await process.forget();
  });
  await check("files", async () => {
    const bytes = Uint8Array.from({ length: 70000 }, (_, index) => index % 256);
    await sandbox.files.write("/tmp/ts/deep/a file", bytes, { mode: 0o640 });
    assert.deepEqual(Buffer.from(await sandbox.files.read("/tmp/ts/deep/a file")), Buffer.from(bytes));
    assert.deepEqual([...await sandbox.files.read("/tmp/ts/deep/a file", { offset: 5, length: 2 })], [5, 6]);
    assert.equal((await sandbox.files.stat("/tmp/ts/deep/a file")).mode & 0o777, 0o640);
    await sandbox.files.write("/tmp/ts/text", "äöü");
    await sandbox.files.write("/tmp/ts/text", "!", { append: true });
    assert.equal(await sandbox.files.readText("/tmp/ts/text"), "äöü!");
    await sandbox.files.move("/tmp/ts/text", "/tmp/ts/moved");
    assert.deepEqual((await sandbox.files.list("/tmp/ts")).map((file) => file.name), ["deep", "moved"]);
    await sandbox.files.remove("/tmp/ts/deep", true);
    assert.equal(await sandbox.files.exists("/tmp/ts/deep"), false);
  });
  await check("streamed files and folders", async () => {
    const source = new Blob(["x".repeat(100000)]).stream();
    await sandbox.files.write("/tmp/streamed", source);
    assert.equal((await new Response(await sandbox.files.stream("/tmp/streamed")).text()).length, 100000);
    await sandbox.files.mkdir("/tmp/folder/inner");
    await sandbox.files.write("/tmp/folder/inner/f", "1");
    const tar = new Uint8Array(await new Response(await sandbox.files.pack("/tmp/folder")).arrayBuffer());
    await sandbox.files.unpack(tar, "/tmp/copy");
    assert.equal(await sandbox.files.readText("/tmp/copy/inner/f"), "1");
  });
  await check("an HTTP server on a port", async () => {
    const process = await sandbox.processes.start(["python3", "-c",
      "import http.server as h\nclass H(h.BaseHTTPRequestHandler):\n def do_POST(s):\n"
      + "  body = s.rfile.read(int(s.headers['content-length']))\n  s.send_response(202)\n"
      + "  s.end_headers()\n  s.wfile.write(body + str(s.headers.get('authorization')).encode() + s.path.encode())\n"
      + "h.HTTPServer(('127.0.0.1', 8123), H).serve_forever()"], { stdin: "" });
    for (const end = Date.now() + 20000; ;) {
      const answer = await sandbox.ports.fetch(8123, "/path?q=1", { method: "POST", body: "in ",
        headers: { authorization: "own" } });
      if (answer.status === 202) {
        assert.equal(await answer.text(), "in own/path?q=1");
        break;
      }
      assert.ok(Date.now() < end, `status ${answer.status}`);
    }
    await process.kill();
    assert.throws(() => sandbox.ports.url(70000), rock.InvalidConfig);
  });
  await check("errors have classes and hints", async () => {
    await assert.rejects(sandbox.files.read("/nosuch"), (error) => error instanceof rock.NotFound
      && error instanceof rock.ClientError && error instanceof rock.RockError && error.code === "not_found"
      && error.message.includes("/nosuch"));
    await assert.rejects(sandbox.exec(["nosuchprogram"]), rock.NotFound);
    await assert.rejects(rock.Sandbox.connect("nosuch"), rock.NotFound);
    await assert.rejects(rock.Sandbox.create({ image: IMAGE, memory: "much" }), rock.InvalidConfig);
    await assert.rejects(sandbox.exec(["true"], { timeout: 5000 }), rock.InvalidConfig);
    await assert.rejects(new rock.Client({ apiKey: "wrong" }).serverInfo(), rock.Unauthorized);
    assert.throws(() => new rock.Client({ baseUrl: "nonsense" }), rock.InvalidConfig);
  });
  await check("a server that does not exist is Unavailable", async () => {
    const closed = http.createServer().listen(0, "127.0.0.1");
    await new Promise((resolve) => closed.once("listening", resolve));
    const baseUrl = `http://127.0.0.1:${closed.address().port}`;
    await new Promise((resolve) => closed.close(resolve));
    const began = Date.now();
    await assert.rejects(new rock.Client({ baseUrl }).serverInfo(),
      (error) => error instanceof rock.Unavailable && error.details.unsent === true);
    assert.ok(Date.now() - began < 10000);
    await assert.rejects(new rock.Client({ baseUrl, reconnectTimeout: 0 }).serverInfo(), rock.Unavailable);
    await assert.rejects(new rock.Client({ baseUrl: "http://127.0.0.1:9" }).serverInfo(), rock.InvalidConfig);
  });
  await check("a lost response is retried with the same key, and executed once", async () => {
    let lost = 0;
    const middle = await between((request) => request.url.includes("/execute") && lost++ < 2);
    const other = await rock.Sandbox.connect(sandbox.id, { baseUrl: middle.url });
    const result = await other.exec(["sh", "-c", "echo once >> /tmp/once; wc -l < /tmp/once"]);
    middle.close();
    assert.equal(result.stdout.trim(), "1");
    const keys = middle.seen.filter(([, url]) => url.includes("/execute")).map(([, , key]) => key);
    assert.equal(keys.length, 3);
    assert.equal(new Set(keys).size, 1);
  });
  await check("a lost response of a stream is an error, and is not sent again", async () => {
    let lost = 0;
    const middle = await between((request) => request.url.includes("stream=") && lost++ < 1);
    const other = await rock.Sandbox.connect(sandbox.id, { baseUrl: middle.url });
    await assert.rejects(other.stream(["true"]).wait(), rock.Unavailable);
    middle.close();
    assert.equal(middle.seen.filter(([, url]) => url.includes("stream=")).length, 1);
  });
  await check("frames in any portions", async () => {
    const parser = new rock.FrameParser();
    const bytes = [1, 0, 0, 0, 2, 104, 105, 2, 0, 0, 0, 0];
    const found = bytes.flatMap((byte) => [...parser.feed(Uint8Array.of(byte))]);
    assert.deepEqual(found.map(([kind, data]) => [kind, Buffer.from(data).toString()]), [[1, "hi"], [2, ""]]);
    assert.throws(() => [...new rock.FrameParser().feed(Uint8Array.of(1, 255, 255, 255, 255))], rock.ServerError);
  });
  await check("pause, resume and stop", async () => {
    await sandbox.pause();
    await assert.rejects(sandbox.exec(["true"]), rock.Conflict);
    await sandbox.resume();
    assert.equal((await sandbox.exec(["true"])).exit_code, 0);
  });
} finally {
  await sandbox.stop();
}
await check("a stopped sandbox is a typed error", async () => {
  await assert.rejects(sandbox.exec(["true"]), rock.SandboxError);
  await sandbox.delete();
  await assert.rejects(sandbox.info(), rock.NotFound);
});
if (process.env.ROCK_TEST_ENVIRONMENT) {
  await check("an environment", async () => {
    const environment = await client.makeEnvironment(process.env.ROCK_TEST_ENVIRONMENT, { protocol: "gym" });
    const first = await environment.reset({ seed: 7 });
    const step = await environment.step(1);
    assert.equal(step.reward, 1);
    assert.equal(step.terminated, false);
    assert.deepEqual((await environment.reset({ seed: 7 })).observation, first.observation);
    assert.deepEqual((await environment.step(1)).observation, step.observation);
    await environment.close();
    await assert.rejects(environment.step(0), rock.RockError);
  });
  await check("environments are listed", async () => assert.ok((await client.listEnvironments()).length));
}
process.exitCode = failed ? 1 : 0;
