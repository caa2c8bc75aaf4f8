"""ROCK's agents: `sandbox.agent.install(config)`, and the classes of single agents."""

from rock.sdk.sandbox.agent.base import Agent, DefaultAgent
from rock.sdk.sandbox.agent.config import AgentBashCommand, AgentConfig, DefaultAgentConfig, RockAgentConfig
from rock.sdk.sandbox.agent.iflow_cli import IFlowCli, IFlowCliConfig
from rock.sdk.sandbox.agent.openhands import Openhands, OpenhandsConfig
from rock.sdk.sandbox.agent.rock_agent import RockAgent
from rock.sdk.sandbox.agent.swe_agent import SweAgent, SweAgentConfig

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
