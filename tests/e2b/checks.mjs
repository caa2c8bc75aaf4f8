// Checks of E2B's JavaScript SDK against a server: one line of JSON for each check.
import assert from 'node:assert/strict'
import { CommandExitError, FileNotFoundError, Sandbox, TimeoutError } from 'e2b'
import { Sandbox as Interpreter } from '@e2b/code-interpreter'

const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))

async function until(what) {
  for (const end = Date.now() + 30_000; !what(); await later(50)) assert(Date.now() < end, 'it did not happen')
}

const checks = {
  async commands(sandbox) {
    const result = await sandbox.commands.run('echo out; echo err >&2; echo $A', { envs: { A: '1' } })
    assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n1\n', 'err\n', 0])
    await assert.rejects(sandbox.commands.run('exit 3'), (error) => error instanceof CommandExitError && error.exitCode === 3)
    await assert.rejects(sandbox.commands.run('sleep 100', { timeoutMs: 500 }), TimeoutError)
    const seen = []
    await sandbox.commands.run('for i in 1 2; do echo $i; sleep 0.1; done', { onStdout: (text) => { seen.push(text) } })
    assert.equal(seen.join(''), '1\n2\n')
  },
  async background(sandbox) {
    const handle = await sandbox.commands.run('cat', { background: true, stdin: true })
    await sandbox.commands.sendStdin(handle.pid, 'hello\n')
    assert((await sandbox.commands.list()).some((each) => each.pid === handle.pid))
    await sandbox.commands.closeStdin(handle.pid)
    assert.equal((await handle.wait()).stdout, 'hello\n')
    const late = 'while [ ! -e /tmp/go ]; do sleep 0.05; done; echo late'
    const other = await sandbox.commands.run(late, { background: true })
    await other.disconnect()
    const connected = await sandbox.commands.connect(other.pid)
    await sandbox.files.write('/tmp/go', '')
    assert.equal((await connected.wait()).stdout, 'late\n')
    const killed = await sandbox.commands.run('sleep 100', { background: true })
    assert.equal(await sandbox.commands.kill(killed.pid), true)
    assert.equal(await sandbox.commands.kill(4000000), false)
  },
  async terminal(sandbox) {
    let text = ''
    const decoder = new TextDecoder()
    const handle = await sandbox.pty.create({ cols: 100, rows: 30, onData: (data) => { text += decoder.decode(data) } })
    await sandbox.pty.sendInput(handle.pid, new TextEncoder().encode('stty size; echo p$((1+1)); exit\n'))
    await handle.wait()
    assert.match(text, /30 100/)
    assert.match(text, /p2/)
  },
  async files(sandbox) {
    const written = await sandbox.files.write('é/a.txt', 'hé')
    assert(written.path.endsWith('/é/a.txt'))
    assert.equal(await sandbox.files.read('é/a.txt'), 'hé')
    await sandbox.files.writeFiles([{ path: '/tmp/b"1.txt', data: '1' }, { path: '/tmp/c', data: new Blob(['x']) }])
    assert.deepEqual([...await sandbox.files.read('/tmp/b"1.txt', { format: 'bytes' })], [49])
    assert.deepEqual((await sandbox.files.list('é')).map((each) => each.name), ['a.txt'])
    assert.equal(await sandbox.files.exists('none'), false)
    assert.equal(await sandbox.files.makeDir('m'), true)
    assert.equal(await sandbox.files.makeDir('m'), false)
    assert.equal((await sandbox.files.rename('/tmp/c', 'm/c')).name, 'c')
    await assert.rejects(sandbox.files.read('none'), FileNotFoundError)
    await sandbox.files.remove('m')
    assert.equal(await sandbox.files.exists('m'), false)
  },
  async watch(sandbox) {
    await sandbox.files.makeDir('/tmp/watched')
    const seen = []
    const handle = await sandbox.files.watchDir('/tmp/watched', (event) => { seen.push(`${event.type} ${event.name}`) })
    await sandbox.files.write('/tmp/watched/d', '1')
    await until(() => seen.includes('create d'))
    await handle.stop()
  },
  async urls(sandbox) {
    await sandbox.files.write('/tmp/signed', 'content')
    assert.equal(await (await fetch(await sandbox.downloadUrl('/tmp/signed'))).text(), 'content')
    const form = new FormData()
    form.append('file', new Blob(['data']), 'up')
    assert.equal((await fetch(await sandbox.uploadUrl('/tmp/up'), { method: 'POST', body: form })).status, 200)
    assert.equal(await sandbox.files.read('/tmp/up'), 'data')
  },
  async control(sandbox) {
    const info = await sandbox.getInfo()
    assert.equal(info.metadata.a, 'x y&=')
    const found = await Sandbox.list({ query: { metadata: { a: 'x y&=' } } }).nextItems()
    assert.deepEqual(found.map((each) => each.sandboxId), [sandbox.sandboxId])
    assert.equal((await sandbox.getMetrics()).length, 1)
    await sandbox.setTimeout(60_000)
    assert.equal(await sandbox.pause(), true)
    assert.equal((await Sandbox.connect(sandbox.sandboxId)).sandboxId, sandbox.sandboxId)
    const snapshot = await sandbox.createSnapshot()
    const restored = await Sandbox.create(snapshot.snapshotId)
    assert.equal((await restored.commands.run('echo x')).stdout, 'x\n')
    await restored.kill()
    assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  },
  async code() {
    const sandbox = await Interpreter.create({ timeoutMs: 60_000 })
    const execution = await sandbox.runCode('print(1)\n2')
    assert.deepEqual([execution.text, execution.logs.stdout], ['2', ['1\n']])
    assert.equal((await sandbox.runCode('1/0')).error.name, 'ZeroDivisionError')
    await sandbox.kill()
  },
  async end(sandbox) {
    assert.equal(await sandbox.kill(), true)
    assert.equal(await sandbox.isRunning(), false)
    await assert.rejects(sandbox.commands.run('true'))
  },
}

const sandbox = await Sandbox.create({ timeoutMs: 300_000, metadata: { a: 'x y&=' }, envs: { B: '1' } })
for (const [check, work] of Object.entries(checks)) {
  let problem = ''
  try {
    await work(sandbox)
  } catch (error) {
    problem = String(error.stack ?? error)
  }
  console.log(JSON.stringify({ check, problem }))
}
