"""Where the time of training steps goes."""

from hf_fnl.training.profiling.clock import Clock
from hf_fnl.training.profiling.profile import PHASES, Profile
from hf_fnl.training.profiling.profiler import StepProfiler

__all__ = ["PHASES", "Clock", "Profile", "StepProfiler"]
