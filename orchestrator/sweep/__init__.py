"""Many trials of one job: Ray Tune decides, a pool of warm worker groups executes."""
