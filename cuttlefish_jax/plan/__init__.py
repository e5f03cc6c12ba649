"""From measurements to a factorization plan: which layers become two factors, at what ranks, and why not.

What is ``measured`` of a kernel goes through a rank rule (``rank_rules``), the user's ``rules``, the reasons
to keep a layer (``kept_reasons``) and a budget (``budgets``, ``budget_fit``, ``water_filling``) into a
``plan``; ``planning`` has the order. The plan's JSON is in ``document``, its table in ``report``.
"""
