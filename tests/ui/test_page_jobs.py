"""The screens of jobs: the list, trials, pass@k, live progress, cancel, comparison, hostile names and errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.ui.browser import Watched
from tests.ui.conftest import OWNER, not_attacked, sign_in

from rock.jobs import statistics
from rock.protocol.jobs import ClaimTrials, FinishTrial, JobTask, TrialError
from rock.sync import Client

Open = Callable[[], Watched]
ATTACK = "<img src=x onerror=\"window.attacked=1;alert('xss')\"><script>window.attacked=1</script>"
full = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")


def finish(client: Client, job_id: str, count: int, reward: Callable[[int], float | None], **result: Any) -> None:
    """Claim and end trials; None as the reward fails a trial."""
    claimed = client.jobs.claim(job_id, ClaimTrials(holder="runner-1", count=count))
    for trial in claimed.items:
        value = reward(trial.number)
        more: dict[str, Any] = {"outcome": "completed", "rewards": {"reward": value}}
        if value is None:
            more = {"outcome": "failed", "error": TrialError(kind="infrastructure", type="WorkerLost", message="gone")}
        client.jobs.finish(job_id, trial.number, FinishTrial(token=trial.token, result=result, **more))


def test_a_job_is_followed_compared_and_cancelled(web: RunningServer, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        tasks = [JobTask(name=f"task-{n}") for n in range(4)]
        first = client.jobs.create("nightly", tasks, 2, labels={"suite": "nightly"})
        second = client.jobs.create("candidate", tasks, 2)
        finish(client, second.job_id, 8, lambda number: 1.0)
        page = sign_in(open_page(), web, path="/ui/jobs?label=suite%3Dnightly")
        page.get_by_role("row").filter(has_text="nightly").first.wait_for()
        assert page.get_by_text("candidate").count() == 0
        page.get_by_role("link", name="nightly", exact=True).click()
        page.locator(".progress").get_by_text("0 of 8").wait_for()
        finish(client, first.job_id, 5, lambda number: None if number == 3 else float(number == 1),
               sandbox_id="box-1", run_id="run-1")  # fmt: skip
        page.locator(".progress").get_by_text("5 of 8").wait_for()
        page.locator(".pass").first.get_by_text("95 %").wait_for()
        row = page.get_by_role("table", name="Trials").get_by_role("row").filter(has_text="infrastructure: WorkerLost")
        row.wait_for()
        links = row.get_by_role("link")
        assert [link.get_attribute("href") for link in links.all()[1:]] == ["/ui/sandbox/box-1", "/ui/run/run-1"]
        links.first.click()
        page.get_by_role("heading", name="Trial 3").wait_for()
        page.locator("details", has_text="WorkerLost").get_by_text("gone").wait_for()
        page.get_by_label("error class").select_option("infrastructure")
        assert page.get_by_role("table", name="Trials").get_attribute("aria-rowcount") == "2"
        page.reload()
        row.wait_for()
        assert page.get_by_label("error class").input_value() == "infrastructure"
        page.get_by_label("Compare with the job").fill(second.job_id)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.locator(".comparison").get_by_text("candidate is better in 3, worse in 0").wait_for()
        page.get_by_role("button", name="Cancel the job").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the trials").click()
        page.locator(".title .state-cancelled").wait_for()
        assert client.jobs.get(first.job_id).counts.cancelled == 3


@full
def test_text_of_a_job_is_only_text(web: RunningServer, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        job = client.jobs.create(ATTACK, [JobTask(name=ATTACK)], 2, labels={ATTACK: ATTACK})
        claimed = client.jobs.claim(job.job_id, ClaimTrials(holder="runner-1", count=2))
        error = TrialError(kind="agent", type=ATTACK, message=ATTACK, traceback=ATTACK)
        odd = {"sandbox_id": {"constructor": None}, "run_id": "javascript:alert(1)", "phases": [ATTACK], "x": ATTACK}
        for trial, end in zip(claimed.items, ({"outcome": "failed", "error": error},
                                              {"outcome": "completed", "rewards": {ATTACK: 1.0}}), strict=True):
            client.jobs.finish(job.job_id, trial.number, FinishTrial(token=trial.token, result=odd, **end))
        page = sign_in(open_page(), web, path="/ui/jobs")
        page.get_by_role("link", name=ATTACK, exact=True).wait_for()
        not_attacked(page)
        for number in (1, 2):
            page.goto(f"{web.url}/ui/job/{job.job_id}?trial={number}")
            page.get_by_role("heading", name=f"Trial {number}").wait_for()
            page.get_by_text("Result", exact=True).click()
            page.locator("pre.result").get_by_text("onerror").wait_for()
            not_attacked(page)
        assert page.locator("a[href^=javascript]").count() == 0


@full
def test_many_trials_are_fluid(web: RunningServer, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        job = client.jobs.create("large", [JobTask(name=f"task-{n}") for n in range(5000)], 2)
        finish(client, job.job_id, 1000, lambda number: float(number % 3 == 0), output="x" * 2000)
    page = sign_in(open_page(), web, path=f"/ui/job/{job.job_id}")
    page.locator(".trials [aria-rowcount='10001']").wait_for()
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    page.evaluate("document.querySelector('.rows').scrollTop = 1e9")
    page.get_by_role("table", name="Trials").get_by_text("task-4999").first.wait_for()


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node: apt-get install nodejs")
def test_figures_equal_those_of_the_command_line() -> None:
    """trials.js against statistics.py. Bootstrap intervals are sampled, so they agree within 0.03."""
    a = {f"t{n}": [float((n * k) % 3 == 0) for k in range(1, 5)] for n in range(60)} | {"few": [1.0], "none": []}
    b = {task: [1.0 - value if task < "t3" else value for value in values] for task, values in a.items()}
    module = Path(__file__).parents[2] / "src" / "rock" / "ui" / "static" / "trials.js"
    code = f"""import({json.dumps(str(module))}).then((m) => {{
        const [a, b] = {json.dumps([a, b])}.map((one) => new Map(Object.entries(one)));
        const single = new Map([["t", [1, 1, 0, 0]]]);
        console.log(JSON.stringify({{ one: m.passAt(a, 1), two: m.passAt(a, 2), five: m.passAt(a, 5), mean: m.meanOf(a),
            single: m.passAt(single, 1), compared: m.compareJobs(a, b), sign: m.signTest(900, 1100) }}));
    }})"""
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    passed = {task: [value >= 1 for value in values] for task, values in a.items()}
    compared = statistics.compare(a, b)
    expected = {"one": statistics.pass_at(passed, 1), "two": statistics.pass_at(passed, 2),
                "mean": statistics.mean_of(a), "single": statistics.pass_at({"t": [True, True, False, False]}, 1)}
    for name, estimate in expected.items():
        assert estimate is not None
        assert found[name] == pytest.approx(asdict(estimate), abs=1e-9 if name == "single" else 0.03), name
        assert found[name]["value"] == pytest.approx(estimate.value) and found[name]["tasks"] == estimate.tasks
    assert found["five"] is None
    sides = found["compared"]
    assert [sides[name] for name in ("better", "worse", "same")] == [
        len(compared.better), len(compared.worse), compared.same]  # fmt: skip
    assert sides["pValue"] == pytest.approx(compared.p_value) and compared.difference is not None
    assert sides["difference"]["value"] == pytest.approx(compared.difference.value)
    assert found["sign"] == pytest.approx(statistics.sign_test(900, 1100))
