"""Evaluation by execution: problems, samples, verdicts, and Pass@k and Pass@k^(m) over them."""
