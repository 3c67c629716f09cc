"""The HTTP server and its chat page; both need the extra `serve`.

In reading order: limits, protocol, models, endpoints, server; and what the page keeps: store,
conversations.
"""
