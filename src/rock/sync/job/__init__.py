# GENERATED from src/rock/sdk/job/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Jobs, with ROCK's names: `Job`, the configurations, results, operators, and the classes of trials."""

from __future__ import annotations

from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.jobs.plan import AgentPlan, Plan, Retry
from rock.sync.job.agents import AgentResult, AgentRunner, AgentTask, register_agent, use_recipes
from rock.sync.job.job import (
    HarborTrialResult,
    Job,
    JobClient,
    JobResult,
    JobStatus,
    Operator,
    ScatterOperator,
    TrialClient,
    TrialResult,
)
from rock.sync.job.trials import AbstractTrial, BashTrial, HarborTrial, SweTrial, TrainingTrial, register_trial

__all__ = [
    "AbstractTrial",
    "AgentPlan",
    "AgentResult",
    "AgentRunner",
    "AgentTask",
    "BashJobConfig",
    "BashTrial",
    "HarborJobConfig",
    "HarborTrial",
    "HarborTrialResult",
    "Job",
    "JobClient",
    "JobConfig",
    "JobResult",
    "JobStatus",
    "Operator",
    "Plan",
    "Retry",
    "ScatterOperator",
    "SweTrial",
    "TrainingTrial",
    "TrialClient",
    "TrialResult",
    "register_agent",
    "register_trial",
    "use_recipes",
]
