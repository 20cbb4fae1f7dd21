"""Model Tailor on small byte-level models of real text: several seeds and two new tasks, in minutes on a CPU."""
