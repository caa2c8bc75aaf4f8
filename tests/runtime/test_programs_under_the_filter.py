"""Interpreters, compilers and a browser in a sandbox: the system call filter refuses nothing that they need.

`make test` runs those that the machine has; `make seccomp-programs` downloads the rest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.packages import CannotBeHad, tree
from tests.runtime.boxes import Box, HandMade, namespace_box, run

ALL = bool(os.environ.get("ROCK_TEST_PROGRAMS"))
_PYTHON = """
import asyncio, concurrent.futures, mmap, multiprocessing, os, select, signal, socket, sqlite3, subprocess, tempfile
import threading, time
def square(n): return n * n
if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(4) as pool: assert sum(pool.map(square, range(9))) == 204
    with multiprocessing.Pool(2) as pool: assert pool.map(square, [3]) == [9]
    async def main():
        server = await asyncio.start_server(lambda r, w: (w.write(b"hello"), w.close()), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.read() == b"hello"
        made = await asyncio.create_subprocess_exec("true")
        assert await made.wait() == 0
    asyncio.run(main())
    base = sqlite3.connect("base.db"); base.execute("create table t(x)"); base.commit()
    assert subprocess.run(["sh", "-c", "exit 7"]).returncode == 7
    os.close(os.memfd_create("m")); os.posix_spawn("/bin/true", ["true"], {}); os.wait()
    with tempfile.TemporaryFile() as file: file.truncate(4096); mmap.mmap(file.fileno(), 4096)[0]
    signal.signal(signal.SIGALRM, lambda *a: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
    os.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1); os.statvfs("/"); os.getrandom(4)
    socket.socketpair(); select.epoll().close(); select.poll()
    print("python works")
"""
_NODE = """
const { Worker } = require('worker_threads'), { execFileSync } = require('child_process'), fs = require('fs')
const http = require('http')
fs.writeFileSync('n.txt', 'x'); fs.watch('.').close()
execFileSync('true')
new Worker('require("worker_threads").parentPort.postMessage(6 * 7)', { eval: true }).on('message', m => {
  const server = http.createServer((q, r) => r.end('ok')).listen(0, '127.0.0.1', () =>
    http.get({ port: server.address().port, host: '127.0.0.1' }, r => r.on('data', d => {
      console.log('node works', m, String(d)); process.exit(0) })))
})
"""
_JAVA = """
import java.nio.file.*; import java.util.concurrent.*;
class Works { public static void main(String[] a) throws Exception {
  ExecutorService pool = Executors.newFixedThreadPool(4);
  int n = pool.submit(() -> 6 * 7).get(); pool.shutdown();
  Files.writeString(Path.of("j.txt"), "x");
  new java.net.ServerSocket(0).close();
  new ProcessBuilder("true").start().waitFor();
  System.gc(); System.out.println("java works " + n); } }
"""
_C = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void *work(void *p) { *(int *)p = 42; return 0; }
int main(void) {
  pthread_t t; int n = 0, status; pthread_create(&t, 0, work, &n); pthread_join(t, 0);
  if (!vfork()) _exit(0);
  wait(&status); if (system("true")) return 1;
  return printf("gcc works %d\n", n) < 0; }
"""
_GO = """
package main
import ("fmt"; "net"; "net/http"; "io"; "os"; "os/exec"; "sync"; "runtime")
func main() {
  var group sync.WaitGroup; n := make(chan int, 50)
  for i := 0; i < 50; i++ { group.Add(1); go func() { defer group.Done(); runtime.Gosched(); n <- 1 }() }
  group.Wait()
  listener, err := net.Listen("tcp", "127.0.0.1:0"); if err != nil { panic(err) }
  go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "ok") }))
  answer, err := http.Get("http://" + listener.Addr().String()); if err != nil { panic(err) }
  text, _ := io.ReadAll(answer.Body)
  if err := exec.Command("true").Run(); err != nil { panic(err) }
  os.WriteFile("g.txt", []byte("x"), 0600)
  fmt.Println("go works", len(n), string(text))
}
"""
_FILES = {"works.py": _PYTHON, "works.js": _NODE, "Works.java": _JAVA, "works.c": _C, "works.go": _GO,
          "page.html": "<body><script>document.body.innerText = 'chromium ' + ['works'].join()</script></body>"}
_HERE = {
    "python": ("python3", "python3 works.py", "python works"),
    "node": ("node", "node works.js", "node works 42 ok"),
    "java": ("java", "$FOUND -Xmx256m Works.java", "java works 42"),
    "gcc": ("gcc", "gcc -O1 -pthread works.c -o works && ./works", "gcc works 42"),
    "git": ("git", "git init -q r && cd r && git config user.email a@b && git config user.name a && date > f && "
                   "git add f && git commit -qm one && git gc -q && git clone -q . ../copy && git -C ../copy log "
                   "--format='git works %s'", "git works one"),
    "perl": ("perl", "perl -e 'fork || exit; wait; print \"perl works\\n\"'", "perl works"),
    "archives": ("xz", "tar cf - works.py | xz -T2 | xz -d | gzip | tar tzf - && echo archives work", "archives work"),
    "tools": ("tail", "(sleep 0.3; echo more >> log) & echo tools > log; timeout 1 tail -f log; nice -n 5 ionice -c 3 "
                      "taskset -c 0 setsid stat / > /dev/null && prlimit --pid $$ --nofile=128 && echo tools work",
              "tools work"),
}
_IN = "/opt/programs/usr"
_LIBRARIES = ":".join(f"{_IN}/lib/$(uname -m)-linux-gnu{folder}" for folder in ("", "/pulseaudio"))
_FETCHED = {
    "go": (["golang-go"], f"export GOROOT=$(echo {_IN}/lib/go-*) HOME=$PWD GOFLAGS=-p=2 GOTOOLCHAIN=local; "
           "cp -rs $GOROOT goroot; rm -rf goroot/src goroot/pkg; "
           f"cp -r {_IN}/share/go-*/src goroot/src; cp -rL $GOROOT/pkg goroot/pkg 2>/dev/null; "
           "GOROOT=$PWD/goroot goroot/bin/go run works.go", "go works 50 ok"),
    "java": (["openjdk-17-jdk-headless"], f"J=$(echo {_IN}/lib/jvm/java-17-*); [ -x $J/bin/java ] || J=/usr; "
             "$J/bin/java -Xmx256m Works.java", "java works 42"),
    "chromium": (["chromium"], f"export LD_LIBRARY_PATH={_LIBRARIES} HOME=$PWD XDG_CACHE_HOME=$PWD; "
                 f"{_IN}/lib/chromium/chromium --headless=new --no-sandbox --disable-gpu --dump-dom "
                 "file://$PWD/page.html 2>err || tail -5 err",
                 "chromium works"),
}


def _images(folder: Path, *layers: Path) -> HandMade:
    """The machine's programs, and those of the layers, with the settings that Java looks for in /etc."""
    images = HandMade(folder / "image")
    images.extra = tuple(str(layer) for layer in layers)
    for etc in (Path("/etc"), *(layer / "opt/programs/etc" for layer in layers)):
        for settings in etc.glob("java-*"):
            shutil.copytree(settings, images.layer / "etc" / settings.name, dirs_exist_ok=True)
    return images


async def _works(box: Box, command: str, told: str, found: str = "") -> None:
    for name, text in _FILES.items():
        await _put(box, name, text)
    out = await box.sh(command, env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/work",
                                      "FOUND": found})
    assert told in out, out[-3000:]


async def _put(box: Box, name: str, text: str) -> None:
    status, _, err = await box.run("sh", "-c", 'printf "%s" "$1" > "$2"', "sh", text, name)
    assert status.code == 0, err


@pytest.mark.parametrize("name", list(_HERE))
def test_of_this_machine(tmp_path: Path, name: str) -> None:
    program, command, told = _HERE[name]
    found = shutil.which(program, path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        pytest.skip(f"{program} is not on this machine")

    async def main() -> None:
        async with namespace_box(tmp_path, images=_images(tmp_path), memory="1g", cpus=2) as box:
            await _works(box, command, told, os.path.realpath(found))  # not by /etc, which is the image's own

    run(main(), timeout=120)


@pytest.mark.skipif(not ALL, reason="downloads hundreds of megabytes: `make seccomp-programs`")
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", list(_FETCHED))
def test_fetched(tmp_path: Path, name: str) -> None:
    packages, command, told = _FETCHED[name]
    try:
        layer = tree(f"programs-{name}", packages)
    except CannotBeHad as error:
        pytest.fail(str(error))

    async def main() -> None:
        async with namespace_box(tmp_path, images=_images(tmp_path, layer), memory="2g", cpus=2, pids=512) as box:
            await _works(box, command, told)

    run(main(), timeout=600)
