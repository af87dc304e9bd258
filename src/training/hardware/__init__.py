"""What a run computes on: device, precision, strategy, allocator."""
