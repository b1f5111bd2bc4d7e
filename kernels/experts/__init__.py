"""A mixture of experts.

`definition` has it in torch. `routing` chooses each row's experts, `grouping` sorts (row, choice) pairs by expert,
`mixture` computes the experts' products and the weighted sum of a row.
"""
