"""What shows a sweep as it goes: the console, TensorBoard and Optuna, Ray's gauges."""
