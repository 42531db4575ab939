"""`python -m posegrad.testing`: the table of the rules, for docs/rules.md."""

from posegrad.testing.table import markdown

print(markdown())
