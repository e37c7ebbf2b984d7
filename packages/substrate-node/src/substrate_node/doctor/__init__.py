"""Whether guests can be had on this machine, and what to do about it where they can't: looked at, then judged."""

from substrate_node.doctor.diagnosis import Diagnosis, Finding, Kind, Level, diagnosed
from substrate_node.doctor.examination import examined
from substrate_node.doctor.sight import Sight

__all__ = ["Diagnosis", "Finding", "Kind", "Level", "Sight", "diagnosed", "examined"]
