# GENERATED from src/rock/sdk/jobs.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Jobs of a server: the routes below /v1/jobs. `rock.sync.job` runs jobs over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from rock.protocol.jobs import (
    BeatenTrials,
    BeatTrials,
    ClaimedTrials,
    ClaimTrials,
    CreateJob,
    FinishTrial,
    JobDetail,
    JobInfo,
    JobList,
    JobTask,
    TrialInfo,
    TrialList,
)
from rock.protocol.routes import ROUTES
from rock.sdk.http import query_string
from rock.sync.sandbox.link import parse
from rock.sync.transport import Transport

Trials: TypeAlias = list[TrialInfo]


class Jobs:
    """`Client.jobs`: create, read, lease, finish, cancel and delete jobs. NotFound for a job of another tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        name: str,
        tasks: Sequence[JobTask],
        attempts: int = 1,
        config: dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
        key: str | None = None,
    ) -> JobInfo:
        """Create a job: each task is attempted `attempts` times. key: the same key returns the same job. InvalidConfig,
        QuotaExceeded."""
        spec = CreateJob(name=name, tasks=list(tasks), attempts=attempts, config=config or {}, labels=labels or {})
        body = spec.model_dump(mode="json")
        key = key or os.urandom(16).hex()
        return parse(JobInfo, self._transport.json("POST", ROUTES["create_job"].path, body, key=key))

    def list(self, label: str | None = None, limit: int = 100) -> list[JobInfo]:
        """Jobs, newest first. label: "NAME=VALUE"."""
        target = ROUTES["list_jobs"].path + query_string({"label": label, "limit": limit})
        return parse(JobList, self._transport.json("GET", target)).items

    def get(self, job_id: str) -> JobDetail:
        """A job with its configuration and tasks. NotFound."""
        return parse(JobDetail, self._transport.json("GET", _at("get_job", job_id)))

    def trials(self, job_id: str) -> Trials:
        """All trials by number. NotFound."""
        found: Trials = []
        after: int | None = 0
        while after is not None:
            target = _at("list_trials", job_id) + query_string({"after": after})
            page = parse(TrialList, self._transport.json("GET", target))
            found += page.items
            after = page.next
        return found

    def claim(self, job_id: str, spec: ClaimTrials) -> ClaimedTrials:
        """Lease trials to a runner."""
        body = spec.model_dump(mode="json")
        return parse(ClaimedTrials, self._transport.json("POST", _at("claim_trials", job_id), body))

    def beat(self, job_id: str, spec: BeatTrials) -> BeatenTrials:
        """Renew leases."""
        body = spec.model_dump(mode="json")
        return parse(BeatenTrials, self._transport.json("POST", _at("beat_trials", job_id), body))

    def finish(self, job_id: str, number: int, spec: FinishTrial) -> TrialInfo:
        """Store the end of a try. Conflict: another runner has the trial."""
        target = ROUTES["finish_trial"].url(job_id=job_id, number=str(number))
        return parse(TrialInfo, self._transport.json("POST", target, spec.model_dump(mode="json")))

    def cancel(self, job_id: str) -> JobInfo:
        """Cancel pending trials, and running ones through their runners."""
        return parse(JobInfo, self._transport.json("POST", _at("cancel_job", job_id)))

    def delete(self, job_id: str) -> JobInfo:
        """Delete a job. Conflict while a runner has a trial."""
        return parse(JobInfo, self._transport.json("DELETE", _at("delete_job", job_id)))


def _at(name: str, job_id: str) -> str:
    return ROUTES[name].url(job_id=job_id)
