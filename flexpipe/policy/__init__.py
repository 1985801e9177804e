"""The engine that decides: what a machine can do, what a plan costs there, which plan is best."""
