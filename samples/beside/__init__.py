"""Beside what people would pick instead, and against attackers who know: `python -m samples.beside`."""
