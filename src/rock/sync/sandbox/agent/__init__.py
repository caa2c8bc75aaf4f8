# GENERATED from src/rock/sdk/sandbox/agent/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's agents: `sandbox.agent.install(config)`, and the classes of single agents."""

from rock.sync.sandbox.agent.base import Agent, DefaultAgent
from rock.sync.sandbox.agent.config import AgentBashCommand, AgentConfig, DefaultAgentConfig, RockAgentConfig
from rock.sync.sandbox.agent.iflow_cli import IFlowCli, IFlowCliConfig
from rock.sync.sandbox.agent.openhands import Openhands, OpenhandsConfig
from rock.sync.sandbox.agent.rock_agent import RockAgent
from rock.sync.sandbox.agent.swe_agent import SweAgent, SweAgentConfig

__all__ = [
    "Agent",
    "AgentBashCommand",
    "AgentConfig",
    "DefaultAgent",
    "DefaultAgentConfig",
    "IFlowCli",
    "IFlowCliConfig",
    "Openhands",
    "OpenhandsConfig",
    "RockAgent",
    "RockAgentConfig",
    "SweAgent",
    "SweAgentConfig",
]
