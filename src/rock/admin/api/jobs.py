"""Routes of jobs, scoped to the tenant of the caller: rows of protocol/routes.py over the table of jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Path, Query, Request, Response
from pydantic import BaseModel

from rock.errors import InvalidConfig
from rock.http.asgi import parsed, validate
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
    TrialInfo,
    TrialList,
)
from rock.protocol.keys import caller_of
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.store.jobs import PAGE, Jobs

JobId = Annotated[str, Path(max_length=64, pattern=r"^[a-z0-9]+$")]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


_SCHEMA = CreateJob.model_json_schema(ref_template="#/components/schemas/{model}")
_SCHEMA.pop("$defs", None)  # the schema of JobDetail has them too
_JOB_BODY = {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}


def _row(name: str, model: type[BaseModel], status: int = 200) -> dict[str, Any]:
    row = ROUTES[name]
    return {"path": row.path, "summary": row.summary, "response_model": model, "tags": ["jobs"], "status_code": status}


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(orjson.dumps(model.model_dump(mode="json")), status, media_type="application/json")


def add_routes(app: FastAPI, jobs: Jobs) -> None:
    @app.post(**_row("create_job", JobInfo, 201), openapi_extra={"requestBody": _JOB_BODY})
    async def create_job(request: Request) -> Response:
        """Create a job with all its trials; the same idempotency key returns the same job."""
        key, data = request.headers.get(IDEMPOTENCY_KEY), await request.body()
        body = await asyncio.to_thread(lambda: validate(CreateJob, parsed(data)))  # of up to 20,000 tasks
        return _json(await jobs.create(body, caller_of(request.scope).owner, key), 201)

    @app.get(**_row("list_jobs", JobList))
    async def list_jobs(
        request: Request, label: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Response:
        """Jobs, newest first; for the server's owner those of all tenants. `label`: NAME=VALUE."""
        name, separator, value = (label or "").partition("=")
        if label is not None and not separator:
            raise InvalidConfig(f"label={label[:80]} is not NAME=VALUE", hint="for example ?label=suite=nightly")
        wanted = (name, value) if label is not None else None
        return _json(JobList(items=list(await jobs.list(caller_of(request.scope).tenant, wanted, limit))))

    @app.get(**_row("get_job", JobDetail))
    async def get_job(request: Request, job_id: JobId, tasks: bool = True) -> Response:
        """A job with its configuration and its tasks; `tasks=0` leaves them out."""
        return _json(await jobs.get(job_id, caller_of(request.scope).tenant, tasks))

    @app.get(**_row("list_trials", TrialList))
    async def list_trials(
        request: Request,
        job_id: JobId,
        after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
    ) -> Response:
        """Trials with a number above `after`."""
        return _json(await jobs.trials(job_id, caller_of(request.scope).tenant, after, limit))

    @app.post(**_row("claim_trials", ClaimedTrials))
    async def claim_trials(request: Request, job_id: JobId, body: ClaimTrials) -> Response:
        """Lease pending trials, and trials whose lease ended."""
        return _json(await jobs.claim(job_id, caller_of(request.scope).tenant, body))

    @app.post(**_row("beat_trials", BeatenTrials))
    async def beat_trials(request: Request, job_id: JobId, body: BeatTrials) -> Response:
        """Renew leases; responds with the trials that the runner no longer has."""
        return _json(await jobs.beat(job_id, caller_of(request.scope).tenant, body))

    @app.post(**_row("finish_trial", TrialInfo))
    async def finish_trial(request: Request, job_id: JobId, number: Number, body: FinishTrial) -> Response:
        """Store a result with the current token of the trial, or make it pending again."""
        return _json(await jobs.finish(job_id, caller_of(request.scope).tenant, number, body))

    @app.post(**_row("cancel_job", JobInfo))
    async def cancel_job(request: Request, job_id: JobId) -> Response:
        """Cancel pending trials at once, and running ones through their runners."""
        return _json(await jobs.cancel(job_id, caller_of(request.scope).tenant))

    @app.delete(**_row("delete_job", JobInfo))
    async def delete_job(request: Request, job_id: JobId) -> Response:
        """Delete a job and its trials. Conflict while a runner has a trial."""
        return _json(await jobs.delete(job_id, caller_of(request.scope).tenant))
