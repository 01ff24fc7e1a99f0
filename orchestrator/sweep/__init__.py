"""Many trials of one job: Ray Tune decides, a fleet of warm worker groups executes."""
