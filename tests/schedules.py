"""The schedules, which a new one joins by its row in the table of costs."""

from posegrad.schedule._cost import Load, costs

__all__ = ["SCHEDULES"]

SCHEDULES = [cost.schedule for cost in costs(Load())]
