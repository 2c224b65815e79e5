"""What all of pytest knows here: the mark `support`, of which docs/support.md is made."""

pytest_plugins = ["lightning_opt.testing.support"]
