"""Update rules, parameter groups, schedules and cadences. Knows no model and no trainer."""

from hopescale.optim.cadence import Cadence, cadences_of_level
from hopescale.optim.outer import OuterOptimizer
from hopescale.optim.updater import RuleGroup, Updater

__all__ = ["Cadence", "OuterOptimizer", "RuleGroup", "Updater", "cadences_of_level"]
