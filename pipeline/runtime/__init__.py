"""The machine: devices, cores, signals, the network, progress."""
