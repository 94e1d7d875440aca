"""Update rules, parameter groups, schedules and cadences. Knows no model and no trainer."""
