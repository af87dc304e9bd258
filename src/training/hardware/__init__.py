"""What a run computes on: device, precision, strategy, memory allocator."""
