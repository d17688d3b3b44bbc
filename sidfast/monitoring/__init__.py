"""Services alongside training: measurements, spikes, watchdog, signals."""
