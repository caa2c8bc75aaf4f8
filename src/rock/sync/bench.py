# GENERATED from src/rock/sdk/bench.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's import path of configurations of benchmarks: names of `rock.jobs.config` and `rock.sync.job`."""

from __future__ import annotations

from rock.jobs.config import (
    AgentConfig,
    DatasetConfig,
    EnvironmentConfig,
    HarborJobConfig,
    JobConfig,
    OrchestratorConfig,
    RetryConfig,
    TaskConfig,
    VerifierConfig,
)
from rock.sync.job import HarborTrial, HarborTrialResult, Job, JobResult, JobStatus

RockEnvironmentConfig = EnvironmentConfig
LocalDatasetConfig = DatasetConfig

__all__ = [
    "AgentConfig",
    "DatasetConfig",
    "EnvironmentConfig",
    "HarborJobConfig",
    "HarborTrial",
    "HarborTrialResult",
    "Job",
    "JobConfig",
    "JobResult",
    "JobStatus",
    "LocalDatasetConfig",
    "OrchestratorConfig",
    "RetryConfig",
    "RockEnvironmentConfig",
    "TaskConfig",
    "VerifierConfig",
]
