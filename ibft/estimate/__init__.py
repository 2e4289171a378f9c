"""What a training costs, from the configuration alone: parameters, memory, FLOPs, time. `ibft estimate`."""
