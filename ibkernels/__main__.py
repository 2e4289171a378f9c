"""`python -m ibkernels`: which backend serves which op here, and why."""

from ibkernels.backends import report

print(report())
