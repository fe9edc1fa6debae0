"""Record of a run: metrics, log, samples, report, traces, and the rules of its alerts."""
