"""What patch, apply and merge-multi share: the plan and the outputs."""
