"""What a run will take: memory by buffer and place, and time by a simulation of its steps.

Nothing here needs a model's weights, and nothing but `measure` needs torch: a plan is made before
anything is downloaded.
"""
