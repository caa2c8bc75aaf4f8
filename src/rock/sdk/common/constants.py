"""Constants, under ROCK's path."""

from rock.protocol.action import RunMode, RunModeType

PID_PREFIX, PID_SUFFIX = "PIDSTART", "PIDEND"  # around the process id that a command for the background prints

__all__ = ["PID_PREFIX", "PID_SUFFIX", "RunMode", "RunModeType"]
